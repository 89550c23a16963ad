"""The integers of a weight that training has moved."""

import torch
from torch import Tensor

from mpq_plugins.checkpoints.rows import channel_rows, from_channel_rows
from mpq_plugins.plans.entropy_coded import EntropyCoded
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.simulation.integers import IntegerWeight, integer_weight


def trained_integers(weight: Tensor, choice: LayerChoice, before: IntegerWeight) -> IntegerWeight:
    """The integers of the weight as it is now; before: those that training began at.

    Scales are found anew, but for a plan's own step: there they stay, and weights beyond the last code have that.
    """
    scheme = choice.scheme
    if not isinstance(scheme, EntropyCoded) or scheme.step is None:
        return integer_weight(weight, choice)
    folded = before.scale[:, :1].to(weight) / scheme.step  # what folding BatchNorm made of the step, channel by channel
    limit = torch.zeros_like(folded)
    for part in choice.all_parts:
        limit[part.runs.array()] = scheme.step * (2 ** (part.bits - 1) - 1)
    rows = (channel_rows(weight.detach(), choice.channel_axis) / folded).clamp(-limit, limit)
    within = from_channel_rows(rows, weight.shape, choice.channel_axis)
    return integer_weight(within, choice).rescaled(folded[:, 0].cpu())
