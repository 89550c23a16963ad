"""What is said of a plan, a table or a sweep for those who ask for more: parameters, what was found, the quantizer."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..evaluation.sweep import SweepRow
from ..plans.affine import SYMMETRIES
from ..plans.channels import Channels
from ..plans.plan import Plan
from ..plans.scheme import Scheme
from ..plans.steps import steps_of
from ..plans.table import LayerTable

GRAINS = {"per_tensor": "per tensor", "per_channel": "per channel"}


def plan_details(plan: Plan) -> list[str]:
    """The allocator's parameters, apart from them what it found, and what is left in floating point."""
    skipped = [f"skipped       {len(plan.skipped)} layers, left in floating point"] if plan.skipped else []
    return [*_named("parameters", plan.allocator.parameters), *_named("found", plan.allocator.found), *skipped]


def quantizer_line(plan: Plan) -> str:
    """How the plan's weights become codes, which decides what plans may be compared."""
    folded = ", BatchNorm folded" if plan.fold_bn else ""
    schemes = "; ".join(dict.fromkeys(scheme_words(layer.scheme) for layer in plan.layers))
    steps = sorted(steps_of(plan).values())
    if steps:
        same = f"step {steps[0]:.4g}" if steps[0] == steps[-1] else f"steps {steps[0]:.4g} to {steps[-1]:.4g}"
        schemes = f"{schemes}, {same}"
    return f"quantizer     {schemes}{folded}; activations {plan.activations_text}{_ranges(plan)}"


def _ranges(plan: Plan) -> str:
    """How inputs are quantized, without the widths."""
    found = dict.fromkeys(layer.activations.kind for layer in plan.layers if layer.activations is not None)
    return "".join(f", {kind}" for kind in found)


def table_details(table: LayerTable) -> list[str]:
    """What the table holds."""
    channels = ", each by channel too" if any(layer.channel_errors for layer in table.layers) else ""
    sensitivities = [f"sensitivities {', '.join(table.sensitivities)}"] if table.sensitivities else []
    folded = ", BatchNorm folded" if table.fold_bn else ""
    own = [scheme_words(table.scheme_of(layer)) for layer in table.layers]
    schemes = "; ".join(dict.fromkeys([scheme_words(table.scheme), *own]))
    return [
        f"quantizer     {schemes}{folded}",
        f"errors        {', '.join(table.metrics)} at {value_text(list(table.bits))} bits{channels}",
        *sensitivities,
    ]


def sweep_details(rows: Sequence[SweepRow]) -> list[str]:
    """Of each allocator the parameters that all its rows share."""
    lines = []
    for allocator in dict.fromkeys(row.allocator for row in rows if row.parameters):
        first, *others = [row.parameters for row in rows if row.allocator == allocator]
        same = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
        lines += [f"{allocator}, {line}" for line in _named("parameters", same)]
    return lines


def scheme_words(scheme: Scheme) -> str:
    """`affine, per channel, clipped`: a scheme as a person says it."""
    if scheme.name == "entropy_coded":
        return "entropy-coded"
    if scheme.name in ("ggml", "minifloat"):
        return str(scheme)
    size = getattr(scheme, "group_size", None)
    grain = GRAINS.get(scheme.granularity, f"groups of {size}")
    said = SYMMETRIES.get(getattr(scheme, "symmetric", False), "symmetric")
    symmetric = [said] if said != "asymmetric" else []
    clipped = ["clipped"] if getattr(scheme, "range", "minmax") != "minmax" else []
    dtype = getattr(scheme, "scale_dtype", "float32")
    rounded = [f"scales in {dtype}"] if dtype != "float32" else []
    seed = getattr(scheme, "stochastic", None)
    drawn = [] if seed is None else [f"rounded stochastically (seed {seed})"]
    return ", ".join((scheme.name, *symmetric, grain, *clipped, *rounded, *drawn))


def value_text(value: Any) -> str:
    """A parameter's value: numbers to four digits, ascending integers as runs."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return " ".join(f"{name}:{value_text(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        if value and all(type(inner) is int and inner >= 0 for inner in value):
            with suppress(ValueError):  # they do not ascend
                return str(Channels.of(value))
        return ",".join(map(value_text, value))
    return str(value)


def _named(label: str, values: Mapping[str, Any]) -> list[str]:
    """One line of names and values; none where there are none."""
    said = ", ".join(f"{name}={value_text(value)}" for name, value in values.items())
    return [f"{label:<13} {said}"] if values else []
