"""`mpq export`: a checkpoint and its plan as another stack loads them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...common import registry
from ...common.checks import shown
from ...errors import PluginError, SettingError
from ...report.progress import echo, progress_bar, say
from ..backends import backend_names, capabilities_of, nearest
from ..help import SectionCommand
from ..output import claim, json_option, print_json
from ..types import Known

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from ...adapters.contract import Exported
    from ...plans.plan import Plan


def _policies() -> tuple[str, ...]:
    from ...plans.capabilities import POLICIES

    return POLICIES


@click.command(
    cls=SectionCommand,
    epilog="Examples: mpq export plan.json MODEL_DIRECTORY --to mlx -o model-mlx. For the quantizer of another "
    "library, by its own rounding: mpq export plan.json MODEL_DIRECTORY --to modelopt --config-only -o config.json",
)
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.argument("source", metavar="SOURCE", type=click.Path(path_type=Path))
@click.option(
    "--to", "target", required=True, type=backend_names("exporters", "configs"), metavar="NAME",
    help="What to write; `mpq plugins` lists exporters and configs.",
)  # fmt: skip
@click.option("--runtime", metavar="NAME", help="What is to load it, where not all that do take everything.")
@click.option(
    "--config-only", is_flag=True, help="Write the plan's widths for the target's own quantizer, and no weights."
)
@click.option(
    "--policy", type=Known(_policies), default="error", show_default=True,
    help="Where the target lacks what the plan has: up, nearest, or error.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File or directory to write.")
@json_option
def export(
    plan_file: Path,
    source: Path,
    target: str,
    runtime: str | None,
    config_only: bool,
    policy: str,
    output: Path,
    as_json: bool,
) -> None:
    """Write SOURCE, a checkpoint, with the codes of PLAN in the format that another stack loads, and read it back."""
    from ..output import check_output
    from ..sources import check_order

    check_output(output, source, plan_file)
    claim(output, "a checkpoint")
    check_order(plan_file, str(source), "mpq export PLAN SOURCE")
    backend = _loaded(target, config_only)
    from ...plans.capabilities import Change
    from ...plans.legalise import legalise
    from ...plans.plan import Plan

    capabilities = capabilities_of("configs" if config_only else "exporters", target, backend, runtime)
    plan = Plan.load(plan_file)
    changes: tuple[Change, ...] = ()
    if policy != "error":  # which the target refuses in its own words
        plan, changes = legalise(plan, capabilities, policy)  # type: ignore[arg-type]  # checked there
    for change in changes:
        say(f"{change.layer}: {change.before} becomes {change.after} ({change.why})")
    if config_only:
        _write_config(backend, plan, source, output)
        written: dict[str, Any] = {}
    else:
        exported = _write_weights(backend, plan, source, output, runtime)
        written = {**vars(exported), "path": str(exported.path)}
        _say_exported(exported, target, as_json)
    if as_json:
        print_json({"path": str(output), "to": target, **written, "changes": [vars(change) for change in changes]})
    elif config_only:
        echo(f"wrote {output}: {len(plan.layers)} layers for {target}")


def _loaded(target: str, config_only: bool) -> Any:
    """The exporter or writer of configurations. Raises PluginError, and SettingError where the other kind is meant."""
    group, other = ("configs", "exporters") if config_only else ("exporters", "configs")
    if target not in registry.names(group) and target in registry.names(other):
        said = "weights: leave --config-only out" if config_only else "a configuration alone: add --config-only"
        raise SettingError(f"to: {target!r} writes {said}")
    if target not in registry.names(group):
        known = registry.names(group)
        raise PluginError(f"to: {shown(target)} is not installed; there are {', '.join(known)}{nearest(target, known)}")
    return registry.load(group, target)


def _write_config(backend: Any, plan: "Plan", source: Path, output: Path) -> None:
    from ...common.files import write_text

    write_text(output, backend.config(plan, source))


def _write_weights(backend: Any, plan: "Plan", source: Path, output: Path, runtime: str | None) -> "Exported":
    options = {} if runtime is None else {"runtime": runtime}
    with progress_bar("exporting") as progress:
        exported: Exported = backend.export(source, plan, output, progress=progress, **options)
    with progress_bar("reading back") as progress:
        backend.verify(exported.path, plan, source, progress=progress)
    return exported


def _say_exported(exported: "Exported", target: str, as_json: bool) -> None:
    from ...report.tables import bytes_text

    for note in exported.notes:
        say(f"note: {note}")
    if not as_json:
        sizes = f"{bytes_text(exported.layer_bytes)} of {bytes_text(exported.total_bytes)} in total"
        echo(f"wrote {exported.path}: {exported.layers} layers for {target}, {sizes}, read back and as planned")
