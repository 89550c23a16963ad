"""`mpq reconstruct`: a model's codes learned block by block under a plan, written as a checkpoint."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...common.files import exists
from ...errors import SettingError
from ...report.progress import echo, progress_bar, say
from ..help import SectionCommand
from ..output import claim, json_option, print_json

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from torch import nn

    from ...plans.plan import Plan
    from ...reconstruction.settings import BlockReport

GIGABYTE = 1 << 30


@click.command(
    cls=SectionCommand,
    epilog="Example: mpq reconstruct package.module:factory plan.json --calibrate package.module:batches --steps 2000 "
    "-o learned.safetensors",
)
@click.argument("source", metavar="MODULE:FACTORY")
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option(
    "--calibrate", "calibration", metavar="MODULE:FUNCTION", required=True,
    help="Returns batches of inputs without labels; 1,024 samples are usual.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True,
    help="Checkpoint (.safetensors) to write; finished blocks are kept in OUTPUT.partial, and an interrupted run goes "
    "on there.",
)  # fmt: skip
@click.option(
    "--blocks", multiple=True,
    help="Glob or re:expression on module names, of which the outermost are the blocks (default: residual blocks, "
    "transformer layers and the like).",
)  # fmt: skip
@click.option("--steps", type=int, default=20_000, show_default=True, help="For each block.")
@click.option("--batch-size", type=int, default=32, show_default=True, help="Samples a step.")
@click.option("--lr", type=float, help="Adam's, of the rounding (default: 6 / steps, within 0.001 and 0.02).")
@click.option(
    "--loss",
    type=click.Choice(["mse", "fisher"]),
    default="mse",
    show_default=True,
    help="fisher: outputs weighted by squared gradients.",
)
@click.option("--regulariser", type=float, default=0.01, show_default=True, help="Weight of what decides the rounding.")
@click.option("--mix", type=float, default=0.5, show_default=True, help="Share of input values from the float model.")
@click.option("--correct", is_flag=True, help="Correct BatchNorm statistics and biases first.")
@click.option(
    "--tune", type=click.Choice(["rounding", "norms"]), default="rounding", show_default=True,
    help="norms: learn biases and norms along.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="The same gives the same result.")
@click.option("--device", help="Where blocks are learned: cpu, cuda (default: where the model is).")
@click.option("--memory", type=float, default=2.0, show_default=True, help="GiB of cached inputs; more go to disk.")
@click.option(
    "--eval", "evaluation", metavar="MODULE:FUNCTION",
    help="Score the float model, the plan rounded to nearest, and the result.",
)  # fmt: skip
@json_option
def reconstruct(
    source: str,
    plan_file: Path,
    calibration: str,
    output: Path,
    memory: float,
    evaluation: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Learn, block by block, which weights to round up and which down (BRECQ), and write the model with its codes.

    The result is a float checkpoint whose weights lie on the plan's grids: `mpq apply`, and every adapter, find the
    learned codes in it.
    """
    from ...common.store import Store
    from ...plans.plan import Plan
    from ...reconstruction.brecq import reconstruct as learn
    from ..calibration import calibration_batches
    from ..functions import named_function
    from ..output import check_output
    from ..sources import check_order, make_module

    if output.suffix != ".safetensors":
        raise click.UsageError(f"-o {output}: the result is written as safetensors; name a file that ends in that")
    output = output.absolute()  # a user's function may change directory
    check_output(output, source, plan_file, calibration, evaluation)
    if exists(output) and not output.is_file():
        raise SettingError(f"output: {output} is no file; name another")
    claim(output, "a checkpoint")
    score = named_function(evaluation) if evaluation is not None else None
    check_order(plan_file, source, "mpq reconstruct MODULE:FACTORY PLAN")
    plan = Plan.load(plan_file)
    model = make_module(source)
    store = Store.beside(output)
    batches = calibration_batches(calibration)
    _require_same_names(model, plan, batches, settings["correct"])
    reports: list[BlockReport] = []
    with store:
        with progress_bar("reconstructing") as progress, redirect_stdout(sys.stderr):
            learned = learn(
                model, plan, batches, **settings, memory=_bytes(memory), store=store, progress=progress,
                finished=lambda report: _finished(report, reports),
            )  # fmt: skip
        _save(learned, output)
    scores = _scores(model, plan, learned, score) if score is not None else {}
    _print(reports, plan, scores, output, as_json)


def _bytes(gibibytes: float) -> int:
    if not 0 <= gibibytes < 1 << 30:
        raise click.UsageError(f"--memory {gibibytes}: GiB, a number from 0 up")
    return int(gibibytes * GIGABYTE)


def _require_same_names(model: "nn.Module", plan: "Plan", batches: "Sequence[Any]", correcting: bool) -> None:
    """Refuse, before the work, a result that the factory's model could not load. Raises SettingError."""
    from ...models.folding import folded_copy
    from ...simulation.correct import correct

    if correcting:
        with redirect_stdout(sys.stderr):
            made = correct(model, plan, batches)
    elif plan.fold_bn:
        made = folded_copy(model, plan)
    else:
        return
    names, others = model.state_dict().keys(), made.state_dict().keys()
    different = sorted(names ^ others)
    if different:
        raise SettingError(
            f"{different[0]!r}{f' and {len(different) - 1} more' if len(different) > 1 else ''}: would be in only one "
            "of the model and the result, for the plan folds BatchNorm in or a corrected layer has no bias of its own; "
            "use mpq_plugins.reconstruct and save the module, or plan under per_channel without --correct"
        )


def _finished(report: "BlockReport", reports: "list[BlockReport]") -> None:
    if report.resumed and not reports:
        say("going on after the blocks that are finished")
    reports.append(report)


def _save(model: "nn.Module", output: Path) -> None:
    from safetensors.torch import save_file

    from ...common.files import atomic_path

    # Shared tensors are written under each of their names, which a state_dict has too.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(output) as temporary:
        save_file(tensors, temporary, {"format": "pt"})


def _scores(model: "nn.Module", plan: "Plan", learned: "nn.Module", evaluate: Any) -> dict[str, Any]:
    from ...evaluation.scores import checked_scores
    from ...simulation.model import simulated

    with redirect_stdout(sys.stderr):
        return {
            name: checked_scores(evaluate, net, name)
            for name, net in (("float", model), ("nearest", simulated(model, plan)), ("learned", learned))
        }


def _print(reports: "Sequence[BlockReport]", plan: "Plan", scores: dict[str, Any], output: Path, as_json: bool) -> None:
    from ...report.console import console
    from ...report.reconstruction import reconstruction_json, reconstruction_table

    if as_json:
        print_json({**reconstruction_json(reports, plan), "scores": scores, "checkpoint": str(output)})
        return
    console().print(reconstruction_table(reports, plan))
    for name, values in scores.items():
        echo(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
    echo(f"wrote {output}")
