"""What torchao can run, and what is refused by name."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import nn

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import MismatchError
from mpq_plugins.models.borrowed import borrowed_uses
from mpq_plugins.models.plain import why_not_plain
from mpq_plugins.models.tracing import Traced
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.names import weight_name
from mpq_plugins.plans.plan import Plan
from mpq_plugins.plans.storage import Storage

from ..shared.folded import INTEGER_SCHEMES, check_runnable, check_sizes, lent_weights, planned_by_name
from ..shared.input_ranges import taken_ranges

CAPABILITIES = Capabilities(
    backend="torchao",
    bits=tuple(range(1, 9)),
    kinds=("linear", "conv1d", "conv2d", "embedding"),
    schemes=INTEGER_SCHEMES,
    granularities=("per_tensor", "per_channel", "per_group"),
    parts=True,
    activation_bits=(None, 8),
    input_dynamic=("per_token",),
    activation_kinds=("linear", "embedding"),  # an embedding takes indices; convolutions have no such kernel
    storage=Storage("int8, a byte a weight", 8, scale_bits=32, zero_point_bits=8),
)
FUNCTIONS = {F.linear, F.embedding, F.conv1d, F.conv2d}
"""What of torch's functions takes such a tensor for its weight; of arguments by name, torchao's lose some."""


def check(plan: Plan, model: nn.Module) -> None:
    """Check that torchao can run the plan on the model.

    Args:
        plan: The plan.
        model: The float model; it is not changed.

    Raises:
        SettingError: torchao cannot run the plan. The message names layers and the remedy.
        MismatchError: The plan is another model's, or torchao cannot run the model.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import torchao
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> torchao.check(mpq.Uniform(bits=4)(mpq.measure(net, mpq.Affine(granularity="per_channel"))), net)
    """
    bare, _ = taken_ranges(plan, model)
    check_traced(plan, Traced(bare))


def check_traced(plan: Plan, traced: Traced) -> None:
    """The same of a model that what follows asks for its graph too."""
    model = traced.model
    check_runnable(plan, traced, CAPABILITIES)
    check_sizes(plan, "torchao")
    uses = borrowed_uses(model)
    borrowed = {name for name in lent_weights(traced) if not uses.get(name, {None}) <= FUNCTIONS}
    problems = [problem for name in planned_by_name(plan) for problem in _troubles(name, model, borrowed)]
    if problems:
        raise MismatchError(f"torchao cannot run this plan on {type(model).__name__}: {first_few(problems)}")


def _troubles(name: str, model: nn.Module, borrowed: set[str]) -> Iterator[str]:
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    reason = why_not_plain(module, hooks=False)
    if isinstance(parent, nn.MultiheadAttention):
        yield f"{name!r} is MultiheadAttention's own, whose kernels fail on torchao's tensors: skip it"
    elif reason:
        yield f"{name!r} {reason}, and may fail on torchao's tensors: skip it"
    elif weight_name(name) in borrowed:
        yield f"{name!r} lends its weight to a functional call, which may fail on torchao's tensors: skip it"
