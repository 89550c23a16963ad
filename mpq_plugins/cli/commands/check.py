"""`mpq check`: does a plan fit a model, and what does a backend make of it?"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...report.progress import echo, say
from ..backends import backend_names
from ..help import SectionCommand
from ..output import BAD_INPUT, claim, json_option, model_option, print_json, weights_option
from ..types import FileOrFactory, Known

if TYPE_CHECKING:  # `mpq --help` should not wait for them
    from ...plans.capabilities import Change
    from ...plans.plan import Plan
    from ...plans.storage import Storage
    from ...simulation.match import Match


@dataclass(frozen=True)
class _Legal:
    """A plan as a backend can run it, what changed, and how the backend keeps weights, where it says so."""

    plan: "Plan"
    changes: "tuple[Change, ...]"
    storage: "Storage | None"


def _policies() -> tuple[str, ...]:
    from ...plans.capabilities import POLICIES

    return POLICIES


@click.command(
    cls=SectionCommand,
    epilog="Examples: mpq check plan.json model.safetensors. mpq check plan.json SOURCE --backend fx -o legal.json",
)
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.argument("source", type=FileOrFactory())
@click.option(
    "--backend",
    type=backend_names("adapters", "exporters", "configs"),
    metavar="NAME",  # they are more than a line holds
    help="Also list what this backend would have to change; `mpq plugins` lists adapters and exporters.",
)
@click.option(
    "--policy",
    type=Known(_policies),
    default="up",
    show_default=True,
    help="Where a width is missing: up, nearest, or error.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Plan to write as the backend can run it.")
@model_option
@weights_option
@json_option
def check(
    plan_file: Path,
    source: str,
    backend: str | None,
    policy: str,
    output: Path | None,
    model_factory: str | None,
    weights: str | None,
    as_json: bool,
) -> int:
    """Check that a plan was made for SOURCE: same layers, same shapes, same weights; and what a backend makes of it."""
    from ..output import check_output
    from ..sources import check_order, make_module, resolve_source

    if output is not None and backend is None:
        raise click.UsageError("-o writes the plan as a backend can run it; add --backend")
    check_output(output, plan_file, source)
    claim(output, "a plan")
    check_order(plan_file, source, "mpq check PLAN SOURCE")
    from ...plans.plan import Plan
    from ...simulation.match import match  # which takes torch, and a second

    plan = Plan.load(plan_file)
    resolved = resolve_source(source).weights
    if not isinstance(resolved, Path) and (model_factory, weights) != (None, None):
        raise click.UsageError("--model and --weights say what a checkpoint holds, and SOURCE is a module itself")
    model = make_module(model_factory) if model_factory is not None else None
    fit = match(plan, resolved, weights=True, rewrapped=True, key=weights, model=model)
    path = resolved if isinstance(resolved, Path) and not fit.problems else None
    legal = _legalised(plan, backend, policy, path) if backend is not None else None
    if legal is not None and output is not None and not fit.problems:
        legal.plan.save(output)
    if as_json:
        changes = {} if legal is None else _changes_json(str(backend), legal, fit)
        print_json({"ok": not fit.problems, "problems": fit.problems, "notes": fit.notes, **changes})
        return BAD_INPUT if fit.problems else 0
    fit.require(source)
    echo(f"{plan_file} fits {source}: {fit.layers} layers, names and shapes agree")
    for note in fit.notes:
        say(f"note: {note}")
    if legal is not None:
        _print_changes(plan, legal, str(backend))
        _print_storage(str(backend), legal, fit)
    if output is not None:
        echo(f"wrote {output}")
    return 0


def _legalised(plan: "Plan", backend: str, policy: str, source: Path | None) -> "_Legal":
    """The plan as the backend can run it; an exporter also says whether it can write the checkpoint so."""
    from ...plans.legalise import legalise
    from ..backends import capabilities_of, load_backend

    group, loaded = load_backend(backend)
    capabilities = capabilities_of(group, backend, loaded)
    legal, changes = legalise(plan, capabilities, policy)  # type: ignore[arg-type]  # checked there
    if group == "exporters" and source is not None:
        loaded.check(legal, source)
    return _Legal(legal, changes, capabilities.storage)


def _stored_bytes(legal: _Legal, fit: "Match") -> int | None:
    """What the backend keeps of the planned layers, where it says how, and the plan is this source's."""
    from ...plans.storage import stored_bytes

    if legal.storage is None or fit.problems:
        return None
    here = {name: 8 * weight.dtype.itemsize for weight in fit.present for name in weight.names}
    pairs = zip(legal.plan.layers, fit.plan.layers, strict=True)
    dtype_bits = {layer.name: next(here[name] for name in named.names if name in here) for layer, named in pairs}
    return stored_bytes(legal.plan, legal.storage, dtype_bits)


def _changes_json(backend: str, legal: _Legal, fit: "Match") -> dict[str, Any]:
    storage = legal.storage
    stored = {"bytes": _stored_bytes(legal, fit), "as": None if storage is None else storage.words}
    return {"backend": backend, "changes": [vars(change) for change in legal.changes], "stored": stored}


def _print_storage(backend: str, legal: _Legal, fit: "Match") -> None:
    from ...report.tables import bytes_text

    count = _stored_bytes(legal, fit)
    if count is not None and legal.storage is not None:
        planned = bytes_text(legal.plan.size().total_bytes)
        echo(f"{backend} stores {bytes_text(count)}: {legal.storage.words}, where the plan has {planned} in total")


def _print_changes(plan: "Plan", legal: _Legal, backend: str) -> None:
    from ...report.console import console
    from ...report.tables import bytes_text, changes_table

    legal_plan, changes = legal.plan, legal.changes
    if not changes:
        echo(f"{backend} runs it as it is")
        return
    console().print(changes_table(changes))
    before, after = plan.size().total_bytes, legal_plan.size().total_bytes
    count = f"{len(changes)} change{'s' * (len(changes) > 1)}"
    echo(f"{backend}: {count}, {bytes_text(before)} -> {bytes_text(after)} in total")
