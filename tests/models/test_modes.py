"""What is set of torch for a whole thread or process, the default dtype and inference mode, changes no result."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins.simulation.integers import integer_weight

KINDS = ("kl", "distance", "output_mse", "compensated_mse", "fisher", "hessian")


def net() -> nn.Sequential:
    """A convolutional net, whose BatchNorm has statistics."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 8))
    return made.eval()


NET = net()
BATCHES = [torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
TABLE = mpq.measure(NET, mpq.Affine(granularity="per_channel"), (2, 4))
PLAN = mpq.Uniform(bits=4)(TABLE)
CODED = mpq.measure(NET, mpq.EntropyCoded())


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tensors(made: object) -> list[Tensor]:
    """What a result comes to."""
    if isinstance(made, nn.Module):
        return list(made.state_dict().values())
    if isinstance(made, mpq.LayerTable):
        inputs = [layer.inputs.errors["mse"] for layer in made.layers if layer.inputs is not None]
        curves = [curve for layer in made.layers for curve in layer.sensitivities.values()]
        return [torch.from_numpy(curve) for curve in (*inputs, *curves)]
    assert isinstance(made, list | tuple)
    return [value for value in made if isinstance(value, Tensor)]


def integers() -> tuple[Tensor, ...]:
    made = integer_weight(NET.get_parameter("4.weight").detach(), PLAN.by_name["4"])
    return made.codes, made.scale, made.zero_point


def with_inputs(kind: str) -> mpq.Plan:
    return PLAN.with_activations(mpq.Activations(8, range=kind))  # type: ignore[arg-type]  # one of its words


CALLS: dict[str, Callable[[], Any]] = {
    "ranges": lambda: mpq.calibrate_inputs(NET, with_inputs("mse"), BATCHES),
    "extremes": lambda: mpq.calibrate_inputs(NET, with_inputs("minmax"), BATCHES),
    "inputs": lambda: mpq.measure_activations(NET, TABLE, BATCHES, bits=(4, 8)),
    "quantized inputs": lambda: mpq.apply(NET, with_inputs("mse"), calibrate=BATCHES),
    "steps": lambda: mpq.apply(NET, mpq.Budget(file_size=2500)(CODED)),
    "the finest step": lambda: mpq.apply(NET, finest()),
    "integers": integers,
    "made inputs": lambda: mpq.synthetic_batches(NET, (16, 3, 6, 6), count=1, steps=2),
    "learned": lambda: mpq.reconstruct(NET, PLAN, BATCHES, steps=2),
} | {kind: (lambda kind=kind: mpq.sensitivity(NET, TABLE, kind, BATCHES)) for kind in KINDS}


def finest() -> mpq.Plan:
    """A plan with the finest step that its layers can have."""
    layers = []
    for layer in mpq.Budget(file_size=2500)(CODED).layers:
        largest = float(NET.get_parameter(f"{layer.name}.weight").detach().abs().max())
        step = mpq.EntropyCoded().finest_step(largest, 8) * (1 + 1e-6)
        layers.append(layer.model_copy(update={"bits": 8, "scheme": mpq.EntropyCoded(step=step)}))
    return mpq.Budget(file_size=2500)(CODED).model_copy(update={"layers": tuple(layers)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore:few inputs:mpq_plugins.RoundingWarning")
def test_another_default_dtype_changes_no_result(call: str, dtype: torch.dtype) -> None:
    expected = tensors(CALLS[call]())
    with default_dtype(dtype):
        made = tensors(CALLS[call]())
    assert expected
    assert [value.dtype for value in made] == [value.dtype for value in expected]
    assert all(value.equal(same) for value, same in zip(made, expected, strict=True))


@pytest.mark.parametrize("call", [*KINDS, "made inputs", "inputs", "learned"])
@pytest.mark.filterwarnings("ignore:few inputs:mpq_plugins.RoundingWarning")
def test_what_takes_gradients_takes_them_in_inference_mode_too(call: str) -> None:
    expected = tensors(CALLS[call]())
    with torch.inference_mode():
        made = tensors(CALLS[call]())
        assert torch.is_inference_mode_enabled()
    assert all(value.equal(same) for value, same in zip(made, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_were_made_in_inference_mode_are_inputs(kind: str) -> None:
    with torch.inference_mode():
        batches = [batch.clone() for batch in BATCHES]
        made = mpq.sensitivity(NET, TABLE, kind, batches)
    assert tensors(made)[0].equal(tensors(CALLS[kind]())[0])


def test_gradients_stay_switched_off() -> None:
    seen = []

    def output(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        result: Tensor = model(batch)
        return result

    for off in (torch.no_grad, torch.inference_mode):
        with off():
            mpq.sensitivity(NET, TABLE, "distance", BATCHES, output=output)
    assert not any(seen)
