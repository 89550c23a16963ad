"""A model's weights as a plan leaves them, and nothing else of the model changed."""

from collections.abc import Mapping

import torch
from torch import nn

from ..models.folding import folded_copy
from ..models.kinds import quantizable_weights
from ..models.tracing import Traced
from ..plans.layers import LayerChoice
from ..plans.plan import Plan
from .layer import simulate_layer
from .match import match


def simulated(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy whose planned weights are rounded to nearest, under whatever names the plan has for its layers.

    Raises MismatchError (the plan is another model's), and as simulate_model.
    """
    traced = Traced(model)
    return simulate_model(traced, match(plan, model, rewrapped=True, traced=traced).require(type(model).__name__))


def simulate_model(model: nn.Module | Traced, plan: Plan) -> nn.Module:
    """A copy, folded where the plan was measured so, whose planned weights are quantized and dequantized.

    The plan has the model's own names (see match). Raises WeightError (NaN or infinity, or beyond float16 at 16 bits).
    """
    quantized = folded_copy(model, plan)
    _simulate(quantized, plan.by_any_name)
    return quantized


def float_copy(model: nn.Module | Traced, plan: Plan) -> nn.Module:
    """A copy, folded where the plan was measured so, in which only the layers at 16 bits are simulated.

    Backends are given it, so that what they leave in float computes with the values of `simulate_model`. Raises as
    that.
    """
    copied = folded_copy(model, plan)
    set_float16(copied, plan)
    return copied


def set_float16(model: nn.Module, plan: Plan) -> None:
    """Round the layers that the plan has at 16 bits to float16, in the model itself. Raises as simulate_model."""
    _simulate(model, {name: choice for name, choice in plan.by_any_name.items() if choice.rounded_in_float})


def _simulate(model: nn.Module, choices: Mapping[str, LayerChoice]) -> None:
    with torch.no_grad():
        for name, weight in quantizable_weights(model).items():
            if name in choices:
                weight.copy_(simulate_layer(weight, choices[name]))
