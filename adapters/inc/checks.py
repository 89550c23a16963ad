"""What Neural Compressor can run by a plan, and what is refused by name."""

from torch import nn

from mpq_plugins.plans.plan import Plan

from ..shared.compressor_plans import check as check_for_compressor
from ..shared.folded import check_module
from .names import check_float


def check(plan: Plan, model: nn.Module) -> None:
    """Raise MismatchError or SettingError, naming layers and remedy, where `apply` cannot run the plan on the model."""
    check_module(model)
    check_float(model)
    check_for_compressor(plan, model)
