"""Several plans from one measurement: what to measure for all, and where each is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .allocate.base import Allocator, Needs
from .allocate.layout import nothing_to_tie
from .errors import SettingError, SourceError
from .patterns import FUSED, families
from .plan import Plan
from .table import LayerTable

ALWAYS = ("relative", "mse")  # cheap beside the reading, and what every report shows


def joint_needs(allocators: Sequence[Allocator]) -> Needs:
    """What all of them need, in one measurement."""
    needs = [allocator.needs for allocator in allocators]
    return Needs(
        tuple(sorted({b for need in needs for b in need.bits})),
        tuple(dict.fromkeys([*ALWAYS, *(metric for need in needs for metric in need.metrics)])),
        any(need.channel_errors for need in needs),
        next((need.scheme for need in needs if need.scheme is not None), None),
    )


def untied(allocators: Sequence[Allocator], table: LayerTable) -> list[str]:
    """What to say of families that were to be tied and that the model does not have."""
    names = [layer.name for layer in table.layers]
    asked = dict.fromkeys(pattern for own in allocators for pattern in getattr(own, "tie", ()) if pattern in FUSED)
    return [nothing_to_tie(pattern) for pattern in asked if not families(pattern, names)]


def plan_files(plans: Sequence[Plan], output: Path | None) -> list[Path | None]:
    """A file for one plan; for several a directory, with files named by the parameters that vary."""
    if output is None:
        return [None] * len(plans)
    if len(plans) == 1:
        return [output]
    if output.exists() and not output.is_dir():
        raise SettingError(f"output: {output} is a file, and there are {len(plans)} plans; name a directory")
    try:
        output.mkdir(exist_ok=True)
    except OSError as error:
        raise SourceError(f"{output}: cannot make this directory ({error.strerror})") from error
    varying = [
        name
        for name in plans[0].allocator.parameters
        if len({str(plan.allocator.parameters.get(name)) for plan in plans}) > 1
    ]
    return [output / f"{'-'.join([plan.allocator.name, *_labels(plan, varying)])}.json" for plan in plans]


def _labels(plan: Plan, varying: Sequence[str]) -> list[str]:
    def label(value: Any) -> str:
        return str(value).removesuffix(".0").replace("/", "_").replace(" ", "")

    return [f"{name}={label(plan.allocator.parameters.get(name))}" for name in varying]
