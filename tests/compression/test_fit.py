"""Files that take what was asked, whatever rounds their weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import Affine, Budget, EntropyCoded, Uniform
from mpq_plugins.compression.fit import _few
from mpq_plugins.errors import MismatchError, RoundingWarning, SettingError
from tests.helpers.says import naming


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(1024, 10),
    ).eval()  # fmt: skip


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(2)]


def plan_of(model: nn.Module, **budget: Any) -> mpq.Plan:
    return Budget(**budget)(mpq.measure(model, EntropyCoded()))


@pytest.mark.filterwarnings("ignore:few inputs:mpq_plugins.RoundingWarning")
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("budget", [{"file_bits": 1.5}, {"file_bits": 3.0}, {"file_size": 12_000}], ids=str)
def test_the_file_takes_what_was_asked_and_what_it_promises(
    budget: dict[str, float], calibrated: bool, tmp_path: Path
) -> None:
    model = net()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    fitted = mpq.fit_file(model, plan_of(model, **budget), inputs() if calibrated else None)
    container = mpq.compress(fitted.model, fitted.plan, tmp_path / "net.mpqc")
    assert container.size == fitted.file_bytes
    assert container.file_bits == fitted.file_bits
    taken = container.file_bits if "file_bits" in budget else container.size
    (asked,) = budget.values()
    assert 0.98 * asked <= taken <= asked
    assert fitted.plan.allocator.found["file_bytes"] == pytest.approx(container.size, abs=8)
    promised = sum(layer.coded_bytes or 0 for layer in fitted.plan.layers)
    blocks = sum(record.block_bytes for record in container.header.tensors if record.parts is not None)
    assert promised == pytest.approx(blocks, abs=8)
    state = mpq.decompress(container)
    applied = mpq.apply(fitted.model, fitted.plan)
    assert all(torch.equal(state[name], value) for name, value in applied.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    if calibrated:
        assert torch.equal(
            applied.get_parameter("3.weight"), fitted.model.get_parameter("3.weight")
        )  # on the grid already


def test_what_compensation_warns_of_is_said_once() -> None:
    model = net()
    with pytest.warns(RoundingWarning) as said:
        mpq.fit_file(model, plan_of(model, file_bits=2), inputs())
    assert [str(one.message).split(":")[0] for one in said] == ["few inputs to compensate on"]


def test_another_budget_may_be_asked_than_the_plan_was_made_for() -> None:
    model = net()
    fitted = mpq.fit_file(model, plan_of(model, file_bits=1.5), file_bits=2.5)
    assert 2.45 <= fitted.file_bits <= 2.5


def test_a_checkpoint_is_fitted_without_its_model(tmp_path: Path) -> None:
    model = net()
    torch.save(model.state_dict(), tmp_path / "net.pt")
    plan = Budget(file_bits=2)(mpq.measure(tmp_path / "net.pt", EntropyCoded()))
    fitted = mpq.fit_file(tmp_path / "net.pt", plan)
    assert mpq.compress(tmp_path / "net.pt", fitted.plan, tmp_path / "net.mpqc").size == fitted.file_bytes
    with pytest.raises(SettingError, match=naming("batches", "module")):
        mpq.fit_file(tmp_path / "net.pt", plan, inputs())


def test_what_cannot_be_fitted_is_said() -> None:
    model = net()
    table = mpq.measure(model, Affine(granularity="per_channel"))
    with pytest.raises(SettingError, match=naming("step", "Budget(file_bits=...)")):
        mpq.fit_file(model, Uniform(bits=4)(table), file_bits=2)
    plan = plan_of(model, file_bits=2)
    with pytest.raises(SettingError, match=naming("file_bits and file_size")):
        mpq.fit_file(model, plan, file_bits=2, file_size=9000)
    with pytest.raises(SettingError, match="file_bits"):
        mpq.fit_file(model, plan, file_bits=-1)
    with pytest.raises(SettingError, match=naming("larger file")):
        mpq.fit_file(model, plan, file_size=100)
    with pytest.raises(MismatchError):
        mpq.fit_file(nn.Sequential(nn.Linear(4, 4)), plan)


def test_packed_codes_are_refused_with_what_they_would_take(tmp_path: Path) -> None:
    model = net()
    with pytest.raises(SettingError, match=naming("packed", "29,536", "smallest")):
        mpq.compress(model, plan_of(model, file_bits=2), tmp_path / "net.mpqc", coding="packed")
    assert not (tmp_path / "net.mpqc").exists()


def test_the_pilot_takes_few_samples_of_batches_that_are_mappings() -> None:
    batches = [{"tokens": torch.zeros(64, 7), "mask": torch.zeros(64, 7)} for _ in range(6)]
    assert [len(batch["tokens"]) for batch in _few(batches)] == [64, 64]
    assert len(list(_few([torch.zeros(100, 3), torch.zeros(100, 3), torch.zeros(100, 3)]))) == 2


def test_a_file_of_pruned_weights_is_fitted_too() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(512, 512, bias=False)
    nn.init.normal_(layer.weight)
    sparse = mpq.finish(mpq.prune(nn.Sequential(layer), mpq.Sparsity(0.97)))
    zero = sparse.get_parameter("0.weight") == 0
    fitted = mpq.fit_file(sparse, plan_of(sparse, file_size=10_000), [torch.randn(256, 512)])
    assert 9_800 <= fitted.file_bytes <= 10_000
    assert not fitted.model.get_parameter("0.weight")[zero].any()
