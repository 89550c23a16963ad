"""`mpq import`: what another tool measured or decided in, a table or a plan out."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import SettingError
from ...report.progress import echo, progress_bar, say
from ..help import SectionCommand
from ..output import claim, json_option, print_json, weights_option
from ..types import FileOrFactory, Known

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from ...plans.plan import Plan
    from ...plans.table import LayerTable
    from ...plans.type_table import TypeTable

SENSITIVITIES = {"imatrix": "output_mse", "autoround": "autoround", "modelopt": "modelopt"}


def _kinds() -> tuple[str, ...]:
    from ...importing.kinds import KINDS

    return KINDS


@click.command(
    "import",
    cls=SectionCommand,
    epilog="Examples: mpq import imatrix.gguf --onto net.mpqt --source MODEL_DIRECTORY -o weighted.mpqt, then mpq plan "
    "weighted.mpqt --sensitivity output_mse. mpq import olive.json --source MODEL_DIRECTORY -o plan.json",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--onto", type=click.Path(path_type=Path), help="Table that gets the sensitivity; for all but olive.")
@click.option("--source", type=FileOrFactory(), help="The table's model or checkpoint; for imatrix and olive.")
@click.option(
    "--format", "file_format", type=Known(_kinds), metavar="NAME",
    help="imatrix, autoround, modelopt or olive (default: by what FILE holds).",
)  # fmt: skip
@click.option(
    "--skip", multiple=True, metavar="GLOB", help="Layers that the result leaves in floating point; repeatable."
)
@weights_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Table or plan to write.")
@json_option
def import_(
    file: Path,
    onto: Path | None,
    source: str | None,
    file_format: str | None,
    skip: tuple[str, ...],
    weights: str | None,
    output: Path,
    as_json: bool,
) -> None:
    """Take what another tool measured as a sensitivity of a table, or what it decided as a plan.

    FILE is llama.cpp's importance matrix, the scores of AutoRound's AutoScheme (a file, or the directory of several)
    or of ModelOpt's auto_quantize, or Olive's mixed_precision_info.
    """
    from ...importing.kinds import kind_of
    from ..output import check_output

    check_output(output, file, onto, source)
    kind = file_format or kind_of(file)
    claim(output, "a plan" if kind == "olive" else "a table")
    _check_asked(kind, onto, source, weights)
    if kind == "olive":
        assert source is not None
        _write_plan(file, source, skip, weights, output, as_json)
        return
    assert onto is not None
    table = _filled(kind, file, _table(onto), source, skip)
    table.save(output)
    _say_table(kind, table, skip, output, as_json)


def _check_asked(kind: str, onto: Path | None, source: str | None, weights: str | None) -> None:
    """Refuse what a kind of file lacks, and what it has no use for."""
    wants = {"imatrix": (True, True), "olive": (False, True)}.get(kind, (True, False))
    for option, value, wanted in zip(("--onto TABLE", "--source SOURCE"), (onto, source), wants, strict=True):
        if (value is not None) != wanted:
            what = "needs" if wanted else "has no use for"
            raise click.UsageError(f"{option}: a file of {kind} {what} it")
    if weights is not None and kind != "olive":
        raise click.UsageError("--weights: the table says which weights it is of")


def _table(path: Path) -> "LayerTable | TypeTable":
    from ...plans.table import LayerTable
    from ...plans.type_table import TypeTable, is_type_table

    return TypeTable.load(path) if is_type_table(path) else LayerTable.load(path)


def _filled(kind: str, file: Path, table: Any, source: str | None, skip: Sequence[str]) -> "LayerTable | TypeTable":
    """The table with the sensitivity. Raises as the functions that it calls."""
    from ...importing.autoround import import_autoround
    from ...importing.imatrix_error import import_imatrix
    from ...importing.modelopt import import_modelopt

    made: LayerTable | TypeTable
    if kind == "imatrix":
        with progress_bar("weighing errors") as progress:
            made = import_imatrix(file, table, _weights(str(source)), skip=skip, progress=progress)
    elif kind == "autoround":
        made = import_autoround(file, table, skip=skip)
    else:
        made = import_modelopt(file, table, skip=skip)
    return made


def _weights(source: str) -> Any:
    """The module or the path. Raises SettingError for a table."""
    from ..sources import resolve_source

    given = resolve_source(source)
    if given.is_table:
        raise SettingError(f"source: {source} is a table, and the weights that it was measured on are needed")
    return given.weights


def _say_table(kind: str, table: Any, skip: Sequence[str], output: Path, as_json: bool) -> None:
    from ...importing.filling import layers_of

    name, layers = SENSITIVITIES[kind], len(layers_of(table))
    if as_json:
        print_json({"table": str(output), "format": kind, "sensitivity": name, "layers": layers, "skip": skip})
        return
    echo(f"wrote {output}: {layers} layers with {name}; mpq plan {output} --sensitivity {name}")
    if kind == "modelopt":
        say("note: groups' scores add up where fused layers agree: plan with --tie qkv --tie gate_up")


def _write_plan(file: Path, source: str, skip: Sequence[str], weights: str | None, output: Path, as_json: bool) -> None:
    from ...importing.olive import import_olive

    with progress_bar("reading weights") as progress:
        plan: Plan = import_olive(file, _weights(source), skip=skip, weights=weights, progress=progress)
    plan.save(output)
    size = plan.size()
    if as_json:
        print_json({"plan": str(output), "format": "olive", "layers": len(plan.layers), "skipped": plan.skipped})
        return
    echo(f"wrote {output}: {len(plan.layers)} layers at {size.average_bits:.2f} bits a weight")
    if plan.skipped:
        say(f"in floating point: {len(plan.skipped)} layers that {file.name} gives no width")
