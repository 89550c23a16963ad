import pytest
import torch
from mpq_within import Within
from torch import nn

import mpq_plugins as mpq

WIDTHS = range(2, 9)


@pytest.mark.parametrize("most", [0.02, 0.1, 0.3])
def test_every_layer_has_the_fewest_bits_within_the_bound(most: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    table = mpq.measure(net, bits=WIDTHS)
    at = {bits: mpq.apply(net, mpq.Uniform(bits=bits)(table)).state_dict() for bits in WIDTHS}
    plan = Within(most=most)(table)
    for layer in plan.layers:
        weight = net.state_dict()[f"{layer.name}.weight"]
        # An oracle that looks at the weights, and not at the table.
        error = {bits: ((weight - at[bits][f"{layer.name}.weight"]) / weight).abs().mean() for bits in WIDTHS}
        assert layer.bits == next((bits for bits in WIDTHS if error[bits] <= most), 8)
    mpq.verify(mpq.apply(net, plan), plan)


def test_a_bound_that_means_nothing_is_named() -> None:
    with pytest.raises(mpq.SettingError, match="most: 0 is not allowed"):
        Within(most=0)
