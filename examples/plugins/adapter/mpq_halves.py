"""An adapter as somebody else's distribution would bring it: weights at 4 or 8 bits, written from public names."""

from collections.abc import Iterable
from typing import Any

from torch import nn

import mpq_plugins as mpq

CAPABILITIES = mpq.Capabilities(
    backend="halves", bits=(4, 8), kinds=("linear", "conv2d"), granularities=("per_channel",)
)


def check(plan: mpq.Plan, model: nn.Module) -> None:
    mpq.legalise(plan, CAPABILITIES, "error")
    mpq.apply(model, plan)


def apply(model: nn.Module, plan: mpq.Plan, batches: Iterable[Any] = ()) -> nn.Module:
    check(plan, model)
    return mpq.apply(model, plan)


def verify(quantized: nn.Module, plan: mpq.Plan, model: nn.Module, *, batch: Any = None) -> tuple[mpq.LayerCheck, ...]:
    mpq.verify(quantized, plan, model)
    if batch is not None and not quantized(batch).equal(mpq.apply(model, plan)(batch)):
        raise mpq.VerifyError("its outputs are others than apply's")
    return tuple(mpq.LayerCheck.of(layer, "float32") for layer in plan.layers if not layer.in_float)
