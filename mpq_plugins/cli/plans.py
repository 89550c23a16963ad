"""Several plans from one measurement: what to measure for all, and where each is written."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..allocation.budget import Budget
from ..allocation.contract import Allocator, Needs
from ..allocation.guard import JUDGED
from ..allocation.ties import nothing_to_tie
from ..common.files import atomic_directory, exists
from ..common.patterns import FAMILY_WORDS, families
from ..common.progress import Progress
from ..common.registry import at_work, described
from ..errors import PluginError, SettingError
from ..plans.plan import Plan
from ..plans.table import LayerTable
from ..plans.type_table import TypeTable
from ..report.progress import progress_bar


def joint_needs(allocators: Sequence[Allocator]) -> Needs:
    """What all of them need, in one measurement."""
    needs = []
    for allocator in allocators:
        with at_work("allocators", allocator):
            needs.append(allocator.needs)
    return Needs(
        tuple(sorted({b for need in needs for b in need.bits})),
        tuple(dict.fromkeys([*JUDGED, *(metric for need in needs for metric in need.metrics)])),
        any(need.channel_errors for need in needs),
        next((need.scheme for need in needs if need.scheme is not None), None),
    )


def plans_by(allocators: Sequence[Allocator], table: LayerTable | TypeTable) -> list[Plan]:
    """The plan of each, in their order. Raises as they do; PluginError naming one of another package that fails."""
    plans: list[Plan] = []
    for allocator in allocators:
        with at_work("allocators", allocator), progress_bar("deciding") as progress:
            made: Any = _made(allocator, table, progress)
            if not isinstance(made, Plan):
                raise PluginError(f"{described('allocators', allocator)} returned a {type(made).__name__} and no plan")
        plans.append(made)
    return plans


def _made(allocator: Allocator, table: LayerTable | TypeTable, progress: Progress | None) -> Any:
    """What the allocator returns, whatever another package's does; Budget may take its time, and says how far it is."""
    if isinstance(allocator, Budget):
        return allocator.solve(table, progress).plan
    assert isinstance(table, LayerTable), "types are for Budget, which is made sure of before they are measured"
    return allocator(table)


def untied(allocators: Sequence[Allocator], table: LayerTable) -> list[str]:
    """What to say of families that were to be tied and that the model does not have."""
    names = [layer.name for layer in table.layers]
    asked = dict.fromkeys(
        pattern for allocator in allocators for pattern in getattr(allocator, "tie", ()) if pattern in FAMILY_WORDS
    )
    return [nothing_to_tie(pattern) for pattern in asked if not families(pattern, names)]


def plan_files(plans: Sequence[Plan], output: Path | None) -> list[Path | None]:
    """Where each goes: a file for one plan; for several a directory, with files named by the parameters that vary."""
    if output is None:
        return [None] * len(plans)
    if len(plans) == 1:
        return [output]
    if exists(output) and not output.is_dir():
        raise SettingError(f"output: {output} is a file, and there are {len(plans)} plans; name a directory")
    varying = [
        name
        for name in plans[0].allocator.parameters
        if len({str(plan.allocator.parameters.get(name)) for plan in plans}) > 1
    ]
    return [output / f"{'-'.join([plan.allocator.name, *_labels(plan, varying)])}.json" for plan in plans]


def save_plans(plans: Sequence[Plan], files: Sequence[Path | None], output: Path | None) -> None:
    """Write each to its file; a directory that is new appears with all of them, or not at all."""
    if output is None:
        return
    if len(plans) == 1:
        plans[0].save(output)
        return
    with nullcontext(output) if output.is_dir() else atomic_directory(output) as folder:
        for plan, file in zip(plans, files, strict=True):
            assert file is not None, "a directory without files"
            plan.save(folder / file.name)


def _labels(plan: Plan, varying: Sequence[str]) -> list[str]:
    def label(value: Any) -> str:
        return str(value).removesuffix(".0").replace("/", "_").replace(" ", "")

    return [f"{name}={label(plan.allocator.parameters.get(name))}" for name in varying]
