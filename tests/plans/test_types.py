"""Types by name: what each costs, and which shapes can have it."""

import pytest

from mpq_plugins import Affine, SettingError, named_type
from mpq_plugins.plans.types import families, type_names, types_of
from tests.helpers.plans import linear


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mxfp4", 4.25), ("mxfp6_e2m3", 6.25), ("mxfp8_e5m2", 8.25),  # OCP MX 1.0: 8 bits for every 32 weights
        ("nvfp4", 4 + 8 / 16 + 32 / (64 * 256)),  # 32 bits for the layer
        ("fp8_e4m3", 8 + 32 / 256), ("int4_g32", 4.5), ("int4_g64", 4.25), ("int4_g128", 4.125),
        ("int3", 3 + 16 / 256), ("q4_k", 4.5), ("q2_k", 2.625), ("q6_k", 6.5625), ("q8_0", 8.5), ("iq4_xs", 4.25),
    ],
)  # fmt: skip
def test_a_weight_costs_its_code_and_its_share_of_a_scale(name: str, expected: float) -> None:
    assert named_type(name).bits_a_weight((64, 256)) == expected


def test_inputs_must_divide_into_groups() -> None:
    assert named_type("int4_g64").fits((8, 128))
    assert not named_type("int4_g64").fits((8, 96))
    assert named_type("int4_g64").fits((96, 128, 3, 3))
    assert not named_type("mxfp4").fits((128, 8), channel_axis=0)
    assert named_type("mxfp4").fits((128, 8), channel_axis=1)
    assert named_type("fp8_e4m3").fits((3, 7))
    assert named_type("nvfp4").fits((3, 48))
    assert not named_type("nvfp4").fits((16, 40))


def test_words_mean_types_and_families() -> None:
    assert [kind.name for kind in types_of(("mxfp4", "fp8", "mxfp4"))] == ["mxfp4", "fp8_e4m3", "fp8_e5m2"]
    for name in (*families(), *type_names()):
        for kind in types_of((name,)):
            assert named_type(kind.name) == kind
            kind.scheme.check_bits(kind.bits)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "types: none given; some of int2"),
        (("int9",), "type: 'int9' is not allowed; int2"),
        (("mxfp",), "Did you mean mxfp4"),
        ("mxfp4", "types: 'mxfp4' is not allowed; a list of names"),
    ],
)
def test_other_words_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        types_of(words)


def test_a_plans_layer_is_called_by_its_type() -> None:
    for name in type_names():
        kind = named_type(name)
        assert linear("fc", 256, 256, kind.scheme, kind.bits).type == name
    assert linear("fc", 256, 256, Affine(granularity="per_channel"), 4).type is None
    assert linear("fc", 256, 256, named_type("int4").scheme, 32).type is None
