"""`mpq tune`: the smallest of an allocator's plans that a backend's own tuner finds good enough."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import PluginError, SettingError, TuningError
from ...report.progress import echo, progress_bar, say
from ..allocator_options import ALLOCATOR_KEY, AllocatorCommand, allocator_option, allocators_from
from ..fitting import Fitting, fitting_options
from ..output import claim, json_option, judge_option, print_json, say_left_alone, say_written
from ..scheme_options import request_values, scheme_options
from ..types import installed

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from torch import nn

    from ...evaluation.tuning import Tuning
    from ...plans.plan import Plan

BACKENDS = ("inc", "inc_classic")  # of which an environment can have one


@click.command(
    cls=AllocatorCommand,
    epilog="Example: mpq tune mine.py:net --eval mine.py:score --qem 4,3,2,1.5 -o plan.json",
)
@click.argument("source", metavar="MODULE:FACTORY")
@allocator_option
@click.option(
    "--eval", "evaluation", metavar="MODULE:FUNCTION", required=True,
    help="Gives each model's score, above 0 (larger is better).",
)  # fmt: skip
@click.option(
    "--tolerable-loss", type=float, default=0.01, show_default=True, help="Share of the float score that may be lost."
)
@click.option(
    "--backend",
    type=installed("adapters"),
    metavar="NAME",
    help="Whose tuner: inc or inc_classic (default: what is installed).",
)
@fitting_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Plan to write.")
@judge_option
@scheme_options
@json_option
@click.pass_context
def tune(
    ctx: click.Context,
    /,
    source: str,
    allocator: str | None,
    evaluation: str,
    tolerable_loss: float,
    backend: str | None,
    fitting: Fitting,
    output: Path | None,
    judge: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Try an allocator's plans, the smallest first, in Intel Neural Compressor, and keep the first that is good
    enough. Several values of an option (2,3 or 1:4:0.5) are a trial each; default: the allocator's grid.
    """
    from ...evaluation.tuning import Criterion
    from ...report.tuning import Judged
    from ..functions import named_function
    from ..measuring import measure_now
    from ..output import check_output
    from ..plans import joint_needs, plans_by
    from ..request import Request
    from ..sources import Source, make_module, named_files

    check_output(output, source, evaluation, fitting.calibration, *named_files(options))
    claim(output, "a plan")
    Criterion(tolerable_loss)
    request = Request(**request_values(options))
    allocators = allocators_from(ctx, options, scheme=None, grid=getattr(ctx.meta[ALLOCATOR_KEY], "grid", {}))
    run = _tuner(backend)
    evaluate = named_function(evaluation)
    model: nn.Module = make_module(source)
    table = measure_now(Source(source, "module", model), joint_needs(allocators), request)
    batches = fitting.batches(model)
    # Tuners of other packages may have no place for inputs.
    more = {} if batches is None else {"calibrate": batches, "rounding": fitting.rounding}
    with progress_bar("tuning") as progress:
        plans = plans_by(allocators, table)
        judged = Judged.of(table, plans, judge)
        _say_merged(plans)
        try:
            tuning = run(model, plans, evaluate, tolerable_loss, progress=progress, **more)
        except TuningError as error:
            if error.tuning is not None:
                _print(error.tuning, judged, source, fitting, as_json, None)
            raise
    if output is not None:
        tuning.chosen.plan.save(output)
    _print(tuning, judged, source, fitting, as_json, output)
    if not as_json:
        say_left_alone(table)


def _tuner(backend: str | None) -> Any:
    """The backend's `tune`. Raises PluginError (not installed), SettingError (it has none)."""
    from ...common import registry

    if backend is None:
        for name in BACKENDS[1:]:
            with suppress(PluginError):
                return registry.load("adapters", name).tune
    adapter = registry.load("adapters", backend or BACKENDS[0])
    if not hasattr(adapter, "tune"):
        raise SettingError(f"backend: {backend} has no tuner; {', '.join(BACKENDS)}")
    return adapter.tune


def _say_merged(plans: "Sequence[Plan]") -> None:
    """Say where settings make the same plan, which is one trial."""
    from ...evaluation.tuning import smallest_first

    distinct = len(smallest_first(plans))
    if distinct < len(plans):
        say(f"note: the {len(plans)} settings make {distinct} different plans; each is tried once")


def _print(tuning: "Tuning", judged: Any, source: str, fitting: Fitting, as_json: bool, output: Path | None) -> None:
    from ...plans.steps import made_for_file
    from ...report.console import console
    from ...report.tables import CODES_ALONE
    from ...report.tuning import tuning_json, tuning_table

    if as_json:
        plan = str(output) if output else None
        print_json({**tuning_json(tuning, judged), "rounding": fitting.label, "plan": plan})
        return
    console().print(tuning_table(tuning, f"{source}, {fitting.label}", judged))
    if any(made_for_file(trial.plan) for trial in tuning.trials):
        echo(CODES_ALONE)
    echo(f"wanted: {tuning.criterion.text(tuning.baseline)}")
    if tuning.met:
        say_written(output, "plan")
