"""What Neural Compressor can run by a plan, and what is refused by name."""

from torch import nn

from mpq_plugins.models.arguments import check_module
from mpq_plugins.plans.plan import Plan

from ..shared.compressor_plans import check as check_for_compressor
from .names import check_float


def check(plan: Plan, model: nn.Module) -> None:
    """Check that `apply` can run the plan on the model.

    Args:
        plan: The plan.
        model: The float model; it is not changed.

    Raises:
        SettingError: The plan cannot be run. The message names layers and the remedy.
        MismatchError: The plan is another model's, or the model cannot be quantized by Neural Compressor.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import inc
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> inc.check(mpq.Uniform(bits=3)(mpq.measure(net)), net)
    """
    check_module(model)
    check_float(model)
    check_for_compressor(plan, model)
