"""What PT2E can run, and what is refused by name."""

from torch import nn

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import MismatchError, SourceError
from mpq_plugins.models.tracing import Traced
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.plan import Plan
from mpq_plugins.plans.storage import Storage

from ..shared.folded import INTEGER_SCHEMES, check_folding, check_runnable, refuse_wrong_pairs
from ..shared.input_ranges import taken_ranges
from .folded import computed_weights, wrong_pairs

CAPABILITIES = Capabilities(
    backend="pt2e",
    bits=tuple(range(1, 9)),
    kinds=("linear", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "embedding"),
    schemes=INTEGER_SCHEMES,
    parts=True,
    activation_bits=(None, 8),
    input_symmetric=(False, True),
    # torch.compile's frozen int8 kernels drop the zero points of weights without a word.
    activation_kinds=("linear", "conv2d"),
    activation_symmetric=(True,),
    storage=Storage("int8 beside the float32 weights, 5 bytes a weight", 40, scale_bits=32, zero_point_bits=64),
    stochastic=False,
)


def check(plan: Plan, model: nn.Module) -> None:
    """Check that PT2E can run the plan on the model.

    Args:
        plan: The plan.
        model: The float model; it is not changed.

    Raises:
        SettingError: PT2E cannot run the plan. The message names layers and the remedy.
        MismatchError: The plan is another model's, or PT2E cannot run the model.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import pt2e
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> pt2e.check(mpq.Uniform(bits=4)(mpq.measure(net)), net)
    """
    bare, _ = taken_ranges(plan, model)
    check_traced(plan, Traced(bare))


def check_traced(plan: Plan, traced: Traced) -> None:
    """The same of a model that what follows asks for its graph too."""
    model = traced.model
    check_runnable(plan, traced, CAPABILITIES)
    computing = [repr(name) if name else type(model).__name__ for name in computed_weights(model)]
    if computing:
        raise MismatchError(
            f"{first_few(computing, ', ')}: works with a weight that is no parameter, before a norm, which PT2E fails "
            "to fold into it: use mpq_plugins.apply or the inc adapter"
        )
    try:
        check_folding(plan, traced, "PT2E")
    except SourceError:  # torch.fx cannot trace it all; the exported graph says what was folded
        if plan.fold_bn:
            raise
        refuse_wrong_pairs(wrong_pairs(model), "PT2E")
