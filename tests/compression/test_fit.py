"""Files that take what was asked, whatever rounds their weights."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import Affine, Budget, EntropyCoded, Uniform
from mpq_plugins.compression.fit import _few
from mpq_plugins.errors import CompressWarning, MismatchError, RoundingWarning, SettingError
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


@pytest.mark.filterwarnings("ignore:few inputs:mpq_plugins.RoundingWarning")
def test_an_executor_finds_the_same_steps() -> None:
    class Counted(ThreadPoolExecutor):
        units = 0

        def submit(self, *arguments: Any, **named: Any) -> Any:
            self.units += 1
            return super().submit(*arguments, **named)

    model = net()
    plan = plan_of(model, file_bits=2)
    alone = mpq.fit_file(model, plan, inputs())
    with Counted(2) as pool:
        shared = mpq.fit_file(model, plan, inputs(), executor=pool)
    assert pool.units >= 2 * len(plan.layers)
    assert shared.plan == alone.plan
    for name, value in alone.model.state_dict().items():
        assert torch.equal(shared.model.state_dict()[name], value)


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


def with_outlier() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).eval()
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0] = 50.0
    return model


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_layer_that_int8_holds_no_finer_stays_at_its_finest_step(calibrated: bool) -> None:
    model = with_outlier()
    fitted = mpq.fit_file(model, plan_of(model, file_bits=2), [torch.randn(512, 256)] if calibrated else None)
    steps = [layer.scheme.step for layer in fitted.plan.layers if isinstance(layer.scheme, EntropyCoded)]
    assert steps[0] is not None
    assert 50 / 127.6 * 0.999 <= steps[0] <= 50 / 100
    assert 1.95 <= fitted.file_bits <= 2


def test_what_int8_cannot_fill_is_said() -> None:
    model = net()
    with pytest.warns(CompressWarning, match=naming("finest", "30")):
        fitted = mpq.fit_file(model, plan_of(model, file_bits=3), file_bits=30)
    assert fitted.file_bits > 5


@pytest.mark.parametrize("levels", [(-0.1, 0.0, 0.1), (0.25,), (0.0,)], ids=str)
@pytest.mark.filterwarnings("ignore:the file takes:mpq_plugins.CompressWarning")
def test_weights_of_few_values_are_fitted_or_said(levels: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(128, 128))
    picked = torch.randint(0, len(levels), (128, 128), generator=generator)
    model.get_parameter("0.weight").data = torch.tensor(levels)[picked]
    fitted = mpq.fit_file(model, plan_of(model, file_bits=2))
    assert fitted.file_bits <= 2
    kept, given = (one.get_parameter("0.weight") for one in (mpq.apply(model, fitted.plan), model))
    assert torch.equal(kept != 0, given != 0)


@pytest.mark.parametrize("asked", [0.5, 6.5])
def test_far_from_what_the_plan_was_made_for_it_is_found_too(asked: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    for name in ("0.weight", "1.weight"):
        nn.init.normal_(model.get_parameter(name))
    fitted = mpq.fit_file(model, plan_of(model, file_bits=3), file_bits=asked)
    assert 0.97 * asked <= fitted.file_bits <= asked


def test_warnings_stay_as_they_are_where_files_are_fitted_in_threads() -> None:
    models = [net(seed) for seed in range(3)]
    plans = [plan_of(model, file_bits=2) for model in models]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = warnings.showwarning, warnings.filters[:]
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(lambda k: mpq.fit_file(models[k], plans[k], inputs()), range(3)))
        assert (warnings.showwarning, warnings.filters[:]) == before
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warnings.warn("heard", stacklevel=1)
        assert [str(one.message) for one in said] == ["heard"]


def test_a_file_of_weights_that_are_rounded_otherwise_is_said_to_take_more(tmp_path: Path) -> None:
    model = net()
    fitted = mpq.fit_file(model, plan_of(model, file_bits=1.5))
    other = mpq.finish(model)
    with torch.no_grad():
        other.get_parameter("3.weight").mul_(1.5)
    with pytest.warns(CompressWarning, match=naming("promises", "fit_file")):
        mpq.compress(other, fitted.plan, tmp_path / "net.mpqc")


def test_a_plans_file_is_no_plan() -> None:
    with pytest.raises(SettingError, match=naming("str", "Plan.load")):
        mpq.fit_file(net(), "plan.json")  # type: ignore[arg-type]
