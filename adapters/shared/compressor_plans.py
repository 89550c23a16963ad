"""From allocators to plans for Neural Compressor, new and classic: measure the model as it runs there, and decide."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from mpq_plugins.allocation.contract import Allocator
from mpq_plugins.allocation.guard import JUDGED
from mpq_plugins.common.checks import first_problem, shown
from mpq_plugins.errors import SettingError
from mpq_plugins.measurement.measure import measure
from mpq_plugins.models.copying import duplicate
from mpq_plugins.models.kinds import KINDS
from mpq_plugins.plans.affine import Affine
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.legalise import require_legal
from mpq_plugins.plans.plan import Plan
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.plans.scheme_names import NamedScheme, scheme_names
from mpq_plugins.plans.storage import Storage

from .folded import check_model

SCHEME: TypeAdapter[Scheme] = TypeAdapter(NamedScheme)
GIVE = "Affine(...), Piecewise(...), Codebook(...), EntropyCoded(...), GGML(...) or None"

CAPABILITIES = Capabilities(
    backend="Neural Compressor",
    bits=tuple(range(1, 9)),
    kinds=tuple(KINDS.values()),
    schemes=scheme_names(),
    granularities=("per_tensor", "per_channel", "per_group"),
    parts=True,
    float_parts=True,
    storage=Storage("weights in floating point, at the values of their codes"),
)
"""What our registered algorithms and strategies run: anything that can be simulated, weights alone."""


def measured_plan(model: nn.Module, allocator: Allocator, scheme: Scheme | None, skip: Sequence[str]) -> Plan:
    """The allocator's plan for a model's weights as they are: Neural Compressor folds no BatchNorm into them.

    scheme: None takes what the allocator asks for, or asymmetric per-tensor min-max. Raises what `measure` and the
    allocator raise.
    """
    needs = allocator.needs
    metrics = tuple(dict.fromkeys([*JUDGED, *needs.metrics]))  # so that the guard judges as it does everywhere
    table = measure(
        model, scheme or needs.scheme or Affine(), needs.bits, metrics,
        per_channel=needs.channel_errors, skip=skip, fold_bn=False,
    )  # fmt: skip
    return allocator(table)


def combinations(parameters: Mapping[str, Any], varied: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """The parameters once for each combination of the values of those that vary."""
    for values in itertools.product(*varied.values()):
        yield {**parameters, **dict(zip(varied, values, strict=True))}


def as_scheme(value: Any) -> Scheme | None:
    """A scheme, its document, or None, as a scheme. Raises SettingError for anything else."""
    if value is None or isinstance(value, Scheme):
        return value
    if not isinstance(value, dict):
        raise SettingError(f"scheme: {shown(value)} is not allowed; {GIVE}")
    try:
        return SCHEME.validate_json(json.dumps(value, default=repr))  # strict models take mappings from JSON alone
    except ValidationError as error:
        raise SettingError(f"scheme: {first_problem(error)}; give {GIVE}") from error


def as_globs(value: Any) -> tuple[str, ...]:
    """Globs of layers to skip. Raises SettingError for anything else."""
    if not isinstance(value, list | tuple) or not all(isinstance(glob, str) for glob in value):
        raise SettingError(f"skip: {shown(value)} is not allowed; a list of globs, such as ['fc', 'layer1.*']")
    return tuple(value)


def reference_size(allocator: Allocator, scheme: Scheme | None) -> float:
    """Bits of the allocator's plan for a network that is always the same, to put allocators in order without a model.

    Where that network is too small for what is asked, 0.
    """
    try:
        return float(measured_plan(_reference(), allocator, scheme, ()).size().total_bits)
    except SettingError:
        return 0.0


@cache
def _reference() -> nn.Module:
    layers = nn.ModuleList(nn.Linear(256, 32) for _ in range(4))
    generator = torch.Generator().manual_seed(0)
    for scale, layer in enumerate(layers, 1):
        nn.init.normal_(layer.get_parameter("weight"), std=float(scale), generator=generator)
    return layers


def check(plan: Plan, model: nn.Module) -> None:
    """Check that the plan can be run on the model.

    Args:
        plan: The plan.
        model: The float model; it is not changed.

    Raises:
        SettingError: The plan cannot be run. The message names layers and the remedy.
        MismatchError: The plan is another model's.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import inc_classic
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> inc_classic.check(mpq.Uniform(bits=3)(mpq.measure(net)), net)
    """
    check_model(plan, model)
    require_legal(plan, CAPABILITIES)


def check_evaluation(model: nn.Module, evaluate: object, name: str) -> None:
    """Raise SettingError for no evaluation function, or a model in training mode or that cannot be copied."""
    check_function(evaluate, name)
    if any(module.training for module in model.modules()):
        raise SettingError(f"{type(model).__name__}: is in training mode, or a part of it; call model.eval()")
    try:
        duplicate(model)
    except SettingError as error:
        raise SettingError(f"{error}: each trial needs a copy") from error


def check_function(evaluate: object, name: str) -> None:
    """Raise SettingError for what cannot be called."""
    if not callable(evaluate):
        raise SettingError(f"{name}: is a {type(evaluate).__name__}, no function; give the function itself")


def check_max_trials(count: object) -> None:
    """Raise SettingError for a number of trials that makes no run."""
    if type(count) is not int or count < 1:
        raise SettingError(f"max_trials: {count!r} is not allowed; 1 or more")


def check_plans(plans: object) -> None:
    """Raise SettingError for what is no list of plans."""
    if not isinstance(plans, list | tuple) or not all(isinstance(plan, Plan) for plan in plans):
        raise SettingError(f"plans: is a {type(plans).__name__}; a list of Plans")


def several(name: str, value: Any, sequences: Sequence[str]) -> bool:
    """Whether a parameter is a list of values to try: for one that is itself a list, a list of lists."""
    if name not in sequences:
        return isinstance(value, list | tuple)
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, list | tuple) for one in value)


def as_plan(value: Any) -> Plan:
    """A plan, the file of one, or its document, as a plan. Raises FormatError, and SettingError for anything else."""
    if isinstance(value, Plan):
        return value
    if isinstance(value, str | Path):
        return Plan.load(value)
    if isinstance(value, dict):
        return Plan.from_document(value, "plan")
    raise SettingError(f"plan: is a {type(value).__name__}; a Plan, or the file of one")
