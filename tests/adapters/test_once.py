"""A conversion traces a model once and copies it once, however often it asks what follows what and who lends what."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mpq_plugins as mpq
from mpq_plugins import Affine, Plan, Uniform, measure
from tests.adapters import nets

brevitas = pytest.importorskip("mpq_plugins.adapters.brevitas")
fx = pytest.importorskip("mpq_plugins.adapters.fx")
inc = pytest.importorskip("mpq_plugins.adapters.inc")
pt2e = pytest.importorskip("mpq_plugins.adapters.pt2e")
torchao = pytest.importorskip("mpq_plugins.adapters.torchao")

pytestmark = pytest.mark.filterwarnings("ignore")  # what backends warn of is theirs

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
CALLS: dict[str, tuple[int | None, Callable[[nn.Module, Plan], Any]]] = {
    "apply": (None, mpq.apply),
    "fx.prepare": (8, lambda model, plan: fx.prepare(model, plan, IMAGES)),
    "fx.bake": (8, fx.bake),
    "torchao.apply": (None, torchao.apply),
    "brevitas.to_brevitas": (8, brevitas.to_brevitas),
    "pt2e.PlanQuantizer": (None, lambda model, plan: pt2e.PlanQuantizer(plan, model)),
}
PROOFS: dict[str, tuple[int | None, Any]] = {
    "fx.verify": (8, fx), "torchao.verify": (None, torchao), "brevitas.verify": (None, brevitas),
    "pt2e.verify": (None, pt2e), "inc.verify": (None, inc),
}  # fmt: skip
TRACES = {"pt2e.PlanQuantizer": 2}
"""PT2E goes by operators, and so also looks inside layers that compute in their own way."""


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a net of ours is traced, and copied with its weights. torch's own passes trace graphs, not nets."""
    counted: Counter[str] = Counter()
    trace, deepcopy = torch.fx.Tracer.trace, copy.deepcopy

    def tracing(self: torch.fx.Tracer, root: Any, *arguments: Any, **named: Any) -> torch.fx.Graph:
        counted["traces"] += isinstance(root, nets.SmallNet)
        return trace(self, root, *arguments, **named)

    def copying(value: Any, memo: Any = None, *arguments: Any) -> Any:
        counted["copies"] += isinstance(value, nets.SmallNet) and not memo  # a shadow shares all tensors
        return deepcopy(value, memo, *arguments)

    monkeypatch.setattr(torch.fx.Tracer, "trace", tracing)
    monkeypatch.setattr(copy, "deepcopy", copying)
    return counted


def net_and_plan(activation_bits: int | None) -> tuple[nn.Module, Plan]:
    model = nets.made(nets.SmallNet)
    scheme = Affine(granularity="per_channel", symmetric=True)
    return model, Uniform(bits=4)(measure(model, scheme, (4,), fold_bn=True)).with_activation_bits(activation_bits)


@pytest.mark.parametrize("call", CALLS)
def test_a_conversion_traces_once_and_copies_once(call: str, counts: Counter[str]) -> None:
    activation_bits, convert = CALLS[call]
    model, plan = net_and_plan(activation_bits)
    assert plan.fold_bn
    counts.clear()
    convert(model, plan)
    assert counts == {"traces": TRACES.get(call, 1), "copies": 1}


@pytest.mark.parametrize("proof", PROOFS)
def test_a_proof_traces_once_and_copies_once(proof: str, counts: Counter[str]) -> None:
    activation_bits, adapter = PROOFS[proof]
    model, plan = net_and_plan(activation_bits)
    quantized = adapter.apply(model, plan, [IMAGES])
    counts.clear()
    adapter.verify(quantized, plan, model)
    assert counts == {"traces": 1, "copies": 1}


def test_a_measurement_traces_once_and_copies_nothing(counts: Counter[str]) -> None:
    measure(nets.made(nets.SmallNet), bits=(4,), fold_bn=True)
    assert counts == {"traces": 1, "copies": 0}
