"""A model's weights as a plan leaves them, and nothing else of the model changed."""

import torch
from torch import nn

from ..models.folding import folded_copy
from ..models.kinds import quantizable_weights
from ..models.tracing import Traced
from ..plans.plan import Plan
from .layer import simulate_layer


def simulate_model(model: nn.Module | Traced, plan: Plan) -> nn.Module:
    """A copy, folded where the plan was measured so, whose planned weights are quantized and dequantized.

    The plan has the model's own names (see match). Raises WeightError (NaN or infinity).
    """
    quantized = folded_copy(model, plan)
    choices = plan.by_any_name
    with torch.no_grad():
        for name, weight in quantizable_weights(quantized).items():
            if name in choices:
                weight.copy_(simulate_layer(weight, choices[name]))
    return quantized
