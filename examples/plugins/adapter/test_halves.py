import mpq_halves
import pytest
import torch
from torch import nn

import mpq_plugins as mpq

PER_CHANNEL = mpq.Affine(granularity="per_channel")


def test_the_four_names_do_what_the_contract_says() -> None:
    adapter: mpq.Adapter = mpq_halves
    torch.manual_seed(0)
    net, batch = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(5, 12)
    plan = mpq.Uniform(bits=4)(mpq.measure(net, PER_CHANNEL))
    quantized = adapter.apply(net, plan)
    assert [check.layer for check in adapter.verify(quantized, plan, net, batch=batch)] == ["0", "2"]
    with pytest.raises(mpq.VerifyError):
        adapter.verify(net, plan, net)


def test_what_it_cannot_run_is_refused_until_it_is_legalised() -> None:
    net = nn.Sequential(nn.Linear(12, 8)).eval()
    plan = mpq.Uniform(bits=3)(mpq.measure(net, PER_CHANNEL))
    with pytest.raises(mpq.SettingError, match="3 bits"):
        mpq_halves.check(plan, net)
    legal, changes = mpq.legalise(plan, mpq_halves.CAPABILITIES)
    mpq_halves.check(legal, net)
    assert len(changes) == 1
