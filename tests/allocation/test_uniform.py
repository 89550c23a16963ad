import pytest

from mpq_plugins import Uniform
from mpq_plugins.errors import SettingError
from tests.helpers.tables import table


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_layer_gets_the_same(bits: int) -> None:
    plan = Uniform(bits=bits)(table({"a": [1.0] * 8, "b": [2.0] * 8}))
    assert [layer.bits for layer in plan.layers] == [bits, bits]
    assert plan.size().average_bits == bits


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_outside_are_refused(bits: int) -> None:
    with pytest.raises(SettingError, match=f"bits: {bits} is not allowed; 1 to 8"):
        Uniform(bits=bits)
