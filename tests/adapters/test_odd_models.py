"""Whatever an adapter accepts computes what the float model does, to 8 bits; what it does not is refused by name."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mpq_plugins import Affine, MPQError, Plan, SourceError, Uniform, apply, measure
from tests.adapters import odd

brevitas = pytest.importorskip("mpq_plugins.adapters.brevitas")
inc = pytest.importorskip("mpq_plugins.adapters.inc")
pt2e = pytest.importorskip("mpq_plugins.adapters.pt2e")
torchao = pytest.importorskip("mpq_plugins.adapters.torchao")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchao"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.export"),
    pytest.mark.filterwarnings("ignore:erase_node:UserWarning"),
]

TWO_PERCENT = 0.02
SCHEMES = [Affine(granularity="per_channel", symmetric=symmetric) for symmetric in (False, True)]


class NotExportedError(Exception):
    """torch.export, which is the user's call, does not take the model."""


def by_pt2e(model: nn.Module, plan: Plan, inputs: Tensor) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    try:
        exported = torch.export.export(model, (inputs.clone(),)).module()
    except Exception as error:
        raise NotExportedError from error
    prepared = prepare_pt2e(exported, pt2e.PlanQuantizer(plan, model))
    prepared(inputs)
    made: nn.Module = convert_pt2e(prepared)
    return made


ADAPTERS: dict[str, tuple[Callable[[nn.Module, Plan, Tensor], nn.Module], Callable[..., Any]]] = {
    "torchao": (lambda model, plan, _: torchao.apply(model, plan), torchao.verify),
    "brevitas": (lambda model, plan, _: brevitas.to_brevitas(model, plan), brevitas.verify),
    "inc": (lambda model, plan, _: inc.apply(model, plan), inc.verify),
    "pt2e": (by_pt2e, pt2e.verify),
}


def rounding(model: nn.Module, inputs: Tensor) -> Tensor:
    """How far the output moves when every weight does, at random, by up to half a step of 8 bits."""
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        exact = model(inputs)
        for parameter in noisy.parameters():
            if parameter.dim() > 1:
                step = (parameter.amax() - parameter.amin()) / 255
                parameter.add_((torch.rand(parameter.shape) - 0.5) * step)
        moved: Tensor = (noisy(inputs) - exact).norm()
    return moved


def check(adapter: str, names: Sequence[str], seed: int, scheme: Affine, activation_bits: int | None = None) -> str:
    """The law, on one model: what became of it, in a word."""
    model, inputs = odd.odd_model(names, seed), torch.randn(odd.INPUTS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = [name for name, _ in model.named_modules() if name]
    with torch.no_grad():
        exact: Tensor = model(inputs)
    try:
        plan = Uniform(bits=8)(measure(model, scheme, (8,), skip=odd.parametrized(names)))
    except SourceError as error:
        if "no quantizable weights" not in str(error):
            raise
        return "nothing to quantize"
    convert, verify = ADAPTERS[adapter]
    try:
        quantized = convert(model, plan, inputs)
        verify(quantized, plan, model, batch=inputs)
    except NotExportedError:
        return "not exported"
    except MPQError as error:
        if not any(repr(name) in str(error) for name in layers):
            raise
        return "refused"
    finally:
        assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        found, simulated = quantized(inputs), apply(model, plan)(inputs)
    assert (found - exact).norm() <= max(TWO_PERCENT * exact.norm(), 3 * rounding(model, inputs))
    assert torch.allclose(found, simulated, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))
    return "runs"


RUNS = {
    "torchao": {"plain", "circular", "norm", "reads", "twice", "shares with a norm", "hook", "subclass", "linear"},
    "brevitas": {"plain", "circular", "norm", "reads", "twice", "shares with a norm", "transposed", "linear"},
    "inc": odd.PIECES.keys() - {"patched"},
    "pt2e": {"plain", "norm", "norm by keyword", "frozen norm", "asks", "reads", "tied", "twice", "attention"},
}
"""Pieces that each adapter is known to run: they are not refused."""


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("piece", odd.PIECES)
def test_each_odd_piece_alone(adapter: str, piece: str) -> None:
    became = check(adapter, [piece, "plain"], 0, SCHEMES[0])
    assert became == "runs" or piece not in RUNS[adapter]


@given(
    st.sampled_from([*ADAPTERS]),
    st.lists(st.sampled_from([*odd.PIECES]), min_size=1, max_size=4),
    st.integers(0, 999),
    st.sampled_from(SCHEMES),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_odd_pieces_in_a_row(adapter: str, names: list[str], seed: int, scheme: Affine) -> None:
    check(adapter, names, seed, scheme)
