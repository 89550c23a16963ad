import pytest
import torch
from mpq_powers import Powers
from torch import nn

from mpq_plugins import SettingError, Uniform, measure
from mpq_plugins import apply as simulate


def test_weights_become_zero_or_powers_of_two_below_the_greatest() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 4))
    plan = Uniform(bits=4)(measure(net, Powers(), bits=(4,)))
    weight = simulate(net, plan).state_dict()["0.weight"]
    greatest = net.state_dict()["0.weight"].abs().amax(1, keepdim=True)
    exponents = torch.log2((weight / greatest).abs())[weight != 0]
    assert torch.equal(exponents, exponents.round())
    assert -6 <= exponents.min() <= exponents.max() == 0


def test_one_bit_has_no_room_for_a_sign() -> None:
    with pytest.raises(SettingError, match="1 is not allowed with powers"):
        Powers().check_bits(1)
