import pytest
import torch
from mpq_energy import Energy
from torch import nn

from mpq_plugins import Budget, measure, sensitivity


def test_it_is_the_squared_error_times_the_outputs_power() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = [torch.randn(5, 12), torch.randn(5, 12)]
    table = sensitivity(net, measure(net, bits=(2, 4, 8)), Energy(scale=2.0), batches)
    with torch.no_grad():
        power = sum(net(batch).square().mean().item() for batch in batches) / 2
    for layer in table.layers:
        expected = 2 * power * layer.errors["mse"] * layer.numel
        assert layer.sensitivities["energy"] == pytest.approx(expected, rel=1e-4)
    plan = Budget(average_bits=4, bits=(2, 4, 8), sensitivity="energy", parts=False)(table)
    assert plan.size().average_bits <= 4
