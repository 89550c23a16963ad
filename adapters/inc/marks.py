"""What a quantized model carries along: its plan, and how to save it."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from mpq_plugins.errors import SettingError
from mpq_plugins.models.fingerprint import tensors_digest
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.plans.plan import Plan


def weights_digest(model: nn.Module) -> str:
    """Of the weights of all quantizable layers, to the byte."""
    return tensors_digest(quantizable_weights(model))


def mark(model: nn.Module, plan: Plan, configs: Any, save: Callable[..., None]) -> None:
    """Put on a model what it was quantized by, as Neural Compressor does: its `qconfig`, and `save` where it has none.

    Into its dict, for a module may forbid attributes, or have some of these names itself.
    """
    attributes = vars(model)
    attributes["mpq_plan"] = plan
    attributes["mpq_weights"] = weights_digest(model)
    if not hasattr(model, "qconfig"):
        attributes["qconfig"] = configs
    if not hasattr(model, "save"):
        attributes["save"] = functools.partial(save, model)


def plan_of(quantized: nn.Module) -> Plan:
    """Give the plan that a model was quantized by.

    Args:
        quantized: The quantized model.

    Returns:
        The plan.

    Raises:
        SettingError: The model was not quantized by ours.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import inc
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=3)(mpq.measure(net))
        >>> inc.plan_of(inc.apply(net, plan)) == plan
        True
    """
    plan = getattr(quantized, "mpq_plan", None)
    if not isinstance(plan, Plan):
        raise SettingError(f"{type(quantized).__name__}: was not quantized by one of our configurations")
    return plan
