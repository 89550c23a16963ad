"""`mpq apply`: a checkpoint in, the same checkpoint with quantized weights out."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...report.progress import echo, say
from ..fitting import Fitting, fitting_options
from ..help import SectionCommand
from ..output import claim, json_option, print_json, run_model_option, say_notes, weights_option
from ..workers import chosen_executor, worker_options

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from torch import Tensor

    from ...simulation.match import Match

QUANTIZED, LEFT = "fake-quantized", "as they were"


@click.command(
    cls=SectionCommand,
    epilog="Examples: mpq apply model.safetensors plan.json -o quantized.safetensors. On a few hundred inputs: "
    "mpq apply net.pt plan.json --model package.module:factory --calibrate package.module:batches -o q.pt",
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Checkpoint to write.")
@fitting_options
@worker_options("round", "1", "Rounding on inputs")
@run_model_option
@weights_option
@json_option
def apply(
    checkpoint: Path,
    plan_file: Path,
    output: Path,
    fitting: Fitting,
    workers: int | None,
    dask: str | None,
    model_factory: str | None,
    weights: str | None,
    as_json: bool,
) -> None:
    """Write CHECKPOINT with fake-quantized weights, and float16 ones where PLAN has 16 bits, in its own format."""
    from ..output import check_output
    from ..sources import check_order, make_module

    check_output(output, checkpoint, plan_file, fitting.calibration, model_factory)
    claim(output, "a checkpoint")
    fitting.check_workers(workers, dask)
    check_order(plan_file, str(checkpoint), "mpq apply CHECKPOINT PLAN")
    from ...checkpoints.checkpoint import read_checkpoint  # which take torch, and a second
    from ...plans.plan import Plan
    from ...report.progress import progress_bar
    from ...simulation.checkpoint import rewrite
    from ...simulation.planned_tensors import PlannedTensors
    from ..fitted_tensors import fitted_tensors

    loaded = Plan.load(plan_file)
    if fitting.calibrated and model_factory is None:
        raise click.UsageError("calibration runs the checkpoint's model: give --model too")
    model = make_module(model_factory) if model_factory is not None else None
    stored = read_checkpoint(checkpoint, weights, prefer=loaded.weights, whole=True)
    fitted: Mapping[str, Tensor] = {}
    if fitting.calibrated and model is not None:
        with chosen_executor(workers, dask) as executor:
            fitted = fitted_tensors(checkpoint, stored.tensors, loaded, model, str(model_factory), fitting, executor)
    with progress_bar("quantizing") as progress:
        fit = rewrite(checkpoint, loaded, output, progress, fitted=fitted, model=model, checkpoint=stored)
    say_notes(fit, loaded_from=plan_file)
    if fit.present.key is not None:
        say(f"weights: those under {fit.present.key!r}; others in the file are as they were")
    if loaded.quantizes_inputs:
        say(f"note: the plan's activations ({loaded.activations_text}) are not in a checkpoint; weights only")
    planned = PlannedTensors(fit.plan.by_any_name)
    corrected = sorted(name for name in fitted if planned.layer(name) is None)
    if as_json:
        counts = {"layers": len(loaded.layers), "as": _written_as(fit)}
        print_json({"checkpoint": str(output), **counts, "rounding": fitting.label, "corrected": corrected})
    else:
        others = f"{len(corrected)} biases and statistics corrected, all else" if corrected else "everything else"
        echo(f"wrote {output}: {_counts_text(_written_as(fit), fitting.label)}{others} as it was")


def _written_as(fit: "Match") -> dict[str, int]:
    """How many planned layers are fake-quantized, in float16 or bfloat16, or left as they were."""
    dtypes = {name: str(weight.dtype).removeprefix("torch.") for weight in fit.present for name in weight.names}
    counts: Counter[str] = Counter()
    for layer in fit.plan.layers:
        dtype = next(dtypes[name] for name in layer.names if name in dtypes)
        if not layer.in_float:
            counts[QUANTIZED] += 1
        elif any(bits == 16 for bits, _ in layer.widths):
            counts["float16" if dtype == "float32" else dtype] += 1
        else:
            counts[LEFT] += 1
    return dict(counts)


def _counts_text(counts: dict[str, int], rounding: str) -> str:
    """`18 layers fake-quantized (compensated), 2 in float16, `; those left as they were are among all else."""
    quantized = [f"{counts[QUANTIZED]} layers {QUANTIZED} ({rounding})"] if QUANTIZED in counts else []
    halves = [f"{counts[dtype]} in {dtype}" for dtype in ("float16", "bfloat16") if dtype in counts]
    return "".join(f"{text}, " for text in (*quantized, *halves))
