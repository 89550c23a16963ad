"""A model runs under the caller's autocast wherever it is run, and nothing that is computed of it does."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins.models.autocast import autocast_now, own_arithmetic, under_autocast
from mpq_plugins.models.running import run_model

DTYPES = (torch.bfloat16, torch.float16)


class Told(nn.Module):
    """Says in which dtypes it was run."""

    seen: ClassVar[set[torch.dtype]] = set()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):  # and no symbol of it
            self.seen.add(x.dtype)
        return x


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 16, generator=generator) for _ in range(2)]


def curves(table: mpq.LayerTable, kind: str) -> list[list[float]]:
    return [layer.sensitivities[kind].tolist() for layer in table.layers]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["kl", "distance"])
def test_what_is_measured_of_the_output_is_that_of_a_function_that_turns_autocast_on(
    kind: str, dtype: torch.dtype
) -> None:
    """A weight's cast is kept by autocast, and is that of another weight once the layer has one."""
    model = net()
    table = mpq.measure(model, bits=(2, 4))

    def output(tried: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype):
            result: Tensor = tried(batch)
        return result

    oracle = mpq.sensitivity(model, table, kind, inputs(), output=output)
    with torch.autocast("cpu", dtype):
        found = mpq.sensitivity(model, table, kind, inputs())
        by_function = mpq.sensitivity(model, table, kind, inputs(), output=lambda tried, batch: tried(batch))
    assert curves(found, kind) == curves(by_function, kind) == curves(oracle, kind)
    assert curves(found, kind) != curves(mpq.sensitivity(model, table, kind, inputs()), kind)


def test_a_weight_that_is_another_now_is_computed_with() -> None:
    model = net()
    with torch.autocast("cpu", torch.bfloat16):
        before = run_model(model, inputs()[0])
        with torch.no_grad():
            model.get_parameter("0.weight").zero_()
        assert not torch.equal(run_model(model, inputs()[0]), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["output_mse", "compensated_mse"])
def test_sums_of_inputs_are_those_of_no_autocast_where_the_inputs_are(kind: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(16, 24)).eval()  # whose inputs are the batches themselves
    table = mpq.measure(model, bits=(2, 4))
    alone = mpq.sensitivity(model, table, kind, inputs())
    with torch.autocast("cpu", dtype):
        found = mpq.sensitivity(model, table, kind, inputs())
    assert curves(found, kind) == curves(alone, kind)


@pytest.mark.filterwarnings("ignore:few inputs:mpq_plugins.RoundingWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fitted",
    [mpq.compensate, mpq.correct, lambda model, plan, batches: mpq.apply(model, plan, calibrate=batches)],
    ids=["compensate", "correct", "apply"],
)
def test_weights_are_fitted_to_what_the_model_computes_under_autocast(
    fitted: Callable[..., nn.Module], dtype: torch.dtype
) -> None:
    model = net()
    model.insert(2, Told())
    plan = mpq.Uniform(bits=3)(mpq.measure(model))
    Told.seen.clear()
    with torch.autocast("cpu", dtype):
        made = fitted(model, plan, inputs())
    assert Told.seen == {dtype}
    assert all(value.dtype == torch.float32 and bool(value.isfinite().all()) for value in made.state_dict().values())


def test_autocast_is_told_and_held() -> None:
    assert autocast_now() == ()
    with torch.autocast("cpu", torch.float16):
        assert autocast_now() == (("cpu", torch.float16),)
        with own_arithmetic():
            assert autocast_now() == ()
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16
    with under_autocast((("cpu", torch.bfloat16),)):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert autocast_now() == ()
