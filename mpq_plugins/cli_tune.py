"""`mpq tune`: the smallest of an allocator's plans that a backend's own tuner finds good enough."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_options import ALLOCATOR_KEY, AllocatorCommand, allocators_from
from .cli_shared import SCHEME_NAMES, json_option, print_json, say_left_alone, say_written, scheme_options, silenced
from .errors import SettingError

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from torch import nn

    from .tuning import Tuning

DEFAULT_BACKEND = "inc"


@click.command(
    cls=AllocatorCommand,
    epilog="Example: mpq tune package.module:factory --eval package.module:accuracy --qem 4,3,2,1.5 -o plan.json",
)
@click.argument("source", metavar="MODULE:FACTORY")
@click.option("-a", "--allocator", default="mixquant", show_default=True, help="`mpq plugins` lists them.")
@click.option(
    "--eval", "evaluation", metavar="MODULE:FUNCTION", required=True,
    help="Called with the float model and each quantized one; returns a score above 0, larger is better.",
)  # fmt: skip
@click.option(
    "--tolerable-loss", type=float, default=0.01, show_default=True, help="Share of the float score that may be lost."
)
@click.option("--backend", default=DEFAULT_BACKEND, show_default=True, help="Whose tuner: inc, or inc_classic.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Plan to write.")
@scheme_options
@json_option
@click.pass_context
def tune(
    ctx: click.Context,
    /,
    source: str,
    allocator: str,
    evaluation: str,
    tolerable_loss: float,
    backend: str,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Try an allocator's plans from the smallest up, and keep the first that loses little enough.

    Give an option several values (1,2,3 or first:last:step, or repeat it) and every combination is a trial; without
    any, the allocator's own grid is tried. The trials run in Intel Neural Compressor, quietly; where no plan is good
    enough, that is an error that names the best.
    """
    from .cli_plans import joint_needs
    from .cli_sources import Request, check_output, make_module, measure_now, named_function
    from .report.progress import progress_bar
    from .tuning import Criterion

    check_output(output)
    Criterion(tolerable_loss)
    request = Request(**{name: options.pop(name) for name in SCHEME_NAMES})
    allocators = allocators_from(ctx, options, scheme=None, grid=getattr(ctx.meta[ALLOCATOR_KEY], "grid", {}))
    run = _tuner(backend)
    evaluate = silenced(named_function(evaluation)) if as_json else named_function(evaluation)
    model: nn.Module = make_module(source).eval()
    table = measure_now(model, joint_needs(allocators), request, None)
    with progress_bar("tuning") as progress:
        tuning = run(model, [made(table) for made in allocators], evaluate, tolerable_loss, progress=progress)
    if output is not None:
        tuning.chosen.plan.save(output)
    _print(tuning, source, as_json, output)
    if not as_json:
        say_left_alone(table)


def _tuner(backend: str) -> Any:
    """The backend's `tune`. Raises PluginError (not installed), SettingError (it has none)."""
    from . import registry

    adapter = registry.load("adapters", backend)
    if not hasattr(adapter, "tune"):
        raise SettingError(f"backend: {backend} has no tuner; inc, or inc_classic")
    return adapter.tune


def _print(tuning: "Tuning", source: str, as_json: bool, output: Path | None) -> None:
    from .report.tables import console
    from .report.tuning import tuning_json, tuning_table

    if as_json:
        print_json({**tuning_json(tuning), "plan": str(output) if output else None})
        return
    console().print(tuning_table(tuning, source))
    click.echo(f"wanted: {tuning.criterion.text(tuning.baseline)}")
    say_written(output, "plan")
