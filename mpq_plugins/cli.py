"""`mpq`: the only place where words become objects, results are printed and the process exits."""

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, TextIO

import click

from .cli_compress import compress, decompress, inspect
from .cli_options import NAME_KEY, AllocatorCommand, IntegerList, allocators_from
from .cli_pareto import pareto
from .cli_reconstruct import reconstruct
from .cli_shared import (
    SCHEME_NAMES,
    claim,
    json_option,
    model_option,
    print_json,
    say_left_alone,
    say_written,
    scheme_options,
    weights_option,
)
from .cli_sweep import sweep
from .cli_tune import tune
from .common.interrupts import Interrupted, Interrupts
from .common.terminal import lasting_streams
from .common.text import printable_lines, what_it_said
from .errors import MeasureWarning, MPQError, PlanWarning, PluginError, SourceError
from .report.progress import echo, echo_lines, say

BAD_INPUT = 2
INTERNAL = 70  # as sysexits.h has it
UNCOMPARED = "not compared with uniform widths: channels differ in width, and their errors were not measured"


def main() -> None:
    """Run `mpq`: exit 0, 2 with one line on stderr for anything refused, or 130 when interrupted.

    What stdout and stderr can take changes neither files nor the exit, but for one case: a result that was to be
    printed, and went into no file, is lost on a full disk; that is an error. A reader that leaves, as `| head` does,
    and a closed stdout have asked for no more.
    """
    warnings.simplefilter("ignore", PlanWarning)  # the commands say it in their own way
    warnings.showwarning = _say_warning
    interrupts = Interrupts()
    files: list[Path] = []
    with lasting_streams() as (out, _):
        try:
            with interrupts.raised():
                code = _run(files)
                out.flush()
        except (KeyboardInterrupt, click.Abort):
            code = _say_interrupted(interrupts.seen or Interrupted())
        except Interrupted as stop:
            code = _say_interrupted(stop)
        else:
            if interrupts.seen is not None:  # by what swallowed it
                code = _say_interrupted(interrupts.seen)
        if isinstance(out.failure, OSError) and not isinstance(out.failure, BrokenPipeError) and not code:
            code = _lost(out.failure, files)
    sys.exit(code)


def _run(files: list[Path]) -> int:
    """The exit code of the command line; `files` gets what it claims to write."""
    try:
        return int(cli.main(standalone_mode=False, obj=files) or 0)
    except MPQError as error:
        return _fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        echo_lines(error.format_message())
        return BAD_INPUT
    except click.ClickException as error:
        return _fail(error.format_message())
    except (KeyboardInterrupt, Interrupted, click.Abort):
        raise
    except MemoryError as error:
        return _fail(f"not enough memory ({error or 'MemoryError'}); free some, or give less at once")
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except Exception as error:  # noqa: BLE001  # the last net: a fault of ours is one line too
        return _internal(error)
    except BaseException as stop:  # noqa: BLE001
        return _fail(f"code that was called ended the program ({what_it_said(stop)}); it should return instead")


def _say_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own in the commands' voice, others' as Python does."""
    if issubclass(category, MeasureWarning):
        say(f"warning: {message}")
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        (file or sys.stderr).write(printable_lines(text))


def _fail(message: str) -> int:
    say(f"error: {' '.join(message.split())}")
    return BAD_INPUT


def _internal(error: Exception) -> int:
    if os.environ.get("MPQ_DEBUG"):
        sys.stderr.write(f"{printable_lines(''.join(traceback.format_exception(error)))}\n")
    say(f"internal error: {what_it_said(error)}; please report this. MPQ_DEBUG=1 shows where it was")
    return INTERNAL


def _say_interrupted(stop: Interrupted) -> int:
    say(str(stop))
    return stop.code


def _lost(failure: OSError, files: list[Path]) -> int:
    """What could not be printed is an error where it is nowhere else."""
    if files:
        say(f"warning: stdout cannot be written ({failure.strerror}); {', '.join(map(str, files))} is whole")
        return 0
    return _fail(f"stdout cannot be written ({failure.strerror}); what was to be printed is lost")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="A first run: mpq demo. On your own weights: mpq plan model.safetensors --qem 2 -o plan.json",
)
@click.version_option(package_name="mpq-plugins")
def cli() -> None:
    """Decide how many bits each layer of a neural network deserves.

    SOURCE is a .safetensors file, a directory with model.safetensors.index.json, a torch checkpoint, or
    package.module:factory, a function that returns a torch module.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise SourceError(f"the working directory cannot be found ({error.strerror}); change to another") from error


@cli.command(epilog="Example: mpq measure model.safetensors --granularity per_channel -o model.mpqt")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Table to write; `mpq plan` takes it as SOURCE.")
@click.option("--bits", type=IntegerList(), default="2-8", show_default=True, help="Bit-widths to measure.")
@click.option("--metrics", default="relative,mse", show_default=True, help="relative, mse, rmse, sqnr_db, max_abs.")
@click.option("--per-channel-errors", is_flag=True, help="Keep the error of every output channel too.")
@click.option("--input-shape", type=IntegerList(), help="Count MACs for an input of this shape (factory sources).")
@click.option(
    "--sensitivity", "sensitivities", multiple=True, metavar="NAME",
    help="Also what quantizing each layer does to outputs: output_mse, kl, distance, fisher, hessian; repeatable.",
)  # fmt: skip
@click.option(
    "--calibrate", "calibration", metavar="MODULE:FUNCTION", help="Returns the batches of inputs that these need."
)
@click.option(
    "--output-of", "output_function", metavar="MODULE:FUNCTION",
    help="For models without logits: (model, batch) -> tensor (samples, features), such as embeddings.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(1, 1024), help="Threads to measure with (default: as torch has).")
@click.option("--dask", metavar="ADDRESS", help="Measure on the workers of a dask cluster: tcp://HOST:8786.")
@click.option("--device", help="Measure with torch on this device, such as cuda.")
@scheme_options
@json_option
def measure(
    source: str,
    output: Path | None,
    bits: tuple[int, ...],
    metrics: str,
    per_channel_errors: bool,
    input_shape: tuple[int, ...] | None,
    sensitivities: tuple[str, ...],
    calibration: str | None,
    output_function: str | None,
    workers: int | None,
    dask: str | None,
    device: str | None,
    as_json: bool,
    **scheme: Any,
) -> None:
    """Measure the quantization error of every layer at every bit-width, and on request what it does to outputs.

    With -o, what is finished is kept in FILE.measure.partial until the table is written: interrupted or killed, the
    same command goes on from there.
    """
    from .allocation.contract import Needs
    from .cli_calibrate import check_sensitivities, with_sensitivities
    from .cli_partial import partial_file, save_measured
    from .cli_sources import Request, check_output, measure_now, resolve_source
    from .cli_workers import chosen_executor
    from .report.console import console
    from .report.tables import measurement_table

    if output is not None and output.is_dir():
        raise click.UsageError(f"-o: {output} is a directory; name a file to write")
    inputs = (source, calibration, output_function)
    check_output(output, *inputs)
    journal = partial_file(output)
    check_output(journal, *inputs)
    claim(output)
    needs = Needs(bits, tuple(metric.strip() for metric in metrics.split(",")), per_channel_errors)
    resolved = resolve_source(source)
    if bool(sensitivities) != (calibration is not None):
        raise click.UsageError("--sensitivity needs inputs, and inputs are for nothing else: give it and --calibrate")
    if output_function is not None and not sensitivities:
        raise click.UsageError("--output-of is what a --sensitivity looks at; give one")
    if sensitivities:
        check_sensitivities(resolved, sensitivities)
    with chosen_executor(workers, dask) as executor:
        table = measure_now(
            resolved, needs, Request(**scheme), input_shape, journal=journal, executor=executor, device=device
        )
    if calibration is not None:
        table = with_sensitivities(table, resolved, sensitivities, calibration, output_function, output)
    save_measured(table, output)
    if as_json:
        print_json(
            {
                "table": str(output) if output else None,
                "scheme": str(table.scheme),
                "fold_bn": table.fold_bn,
                "bits": table.bits,
                "layers": {
                    layer.name: {
                        "kind": layer.kind, "numel": layer.numel, "macs": layer.macs, "importance": layer.importance,
                        "errors": {metric: values.tolist() for metric, values in layer.errors.items()},
                        "sensitivities": {name: values.tolist() for name, values in layer.sensitivities.items()},
                    }
                    for layer in table.layers
                },
                "skipped": table.skipped,
                "left_alone": dict(table.left_alone),
            }
        )  # fmt: skip
        return
    console().print(measurement_table(table))
    say_left_alone(table)
    say_written(output, "table")


@cli.command(
    cls=AllocatorCommand,
    epilog="An allocator's own options follow --allocator: mpq plan --allocator uniform --help. Repeat one for a "
    "plan each from one measurement: mpq plan SOURCE --qem 2 --qem 3 -o plans",
)
@click.argument("source")
@click.option("-a", "--allocator", default="mixquant", show_default=True, help="`mpq plugins` lists them.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Plan to write, or a directory for several.")
@click.option("--table", "cache", type=click.Path(path_type=Path), help="Keep the measurement here, and reuse it.")
@click.option("--activation-bits", type=int, help="Record bits for activations; floating point when left out.")
@scheme_options
@json_option
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    source: str,
    allocator: str,
    output: Path | None,
    cache: Path | None,
    activation_bits: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Decide the bits of every layer of SOURCE (or of a table that `mpq measure` wrote)."""
    from dataclasses import replace

    from .allocation.guard import compare, worse_text
    from .cli_plans import joint_needs, plan_files, plans_by, save_plans, untied
    from .cli_sources import Request, check_output, measured, named_files
    from .plans.table import is_table
    from .report.console import console
    from .report.tables import bits_summary, layer_json, plan_head, size_json, size_lines

    request = Request(**{name: options.pop(name) for name in SCHEME_NAMES})
    inputs = (source, *named_files(options))
    check_output(output, *inputs, cache)
    check_output(cache, *inputs)
    claim(output)
    assert allocator == ctx.meta[NAME_KEY], "click and we read --allocator differently"
    allocators = allocators_from(ctx, options, scheme=None)
    needs = joint_needs(allocators)
    if request.scheme(needs.scheme).granularity != "per_tensor" and not is_table(Path(source)):
        needs = replace(needs, channel_errors=True)  # what parts will cost, for the comparison
    table = measured(source, needs, request, cache)
    plans = [made.with_activation_bits(activation_bits) for made in plans_by(allocators, table)]
    files = plan_files(plans, output)
    for file in files:
        if output is not None and output.is_dir():
            check_output(file, *inputs, cache)
    for note in untied(allocators, table):
        say(f"note: {note}")
    comparisons = [compare(table, made) for made in plans]
    save_plans(plans, files, output)
    for made, comparison in zip(plans, comparisons, strict=True):
        if comparison is not None and comparison.worse:
            say(f"warning: {worse_text(made, comparison)}")
    if as_json:
        documents = [
            {
                "plan": str(file) if file else None,
                "allocator": made.allocator.model_dump(),
                "layers": {layer.name: layer_json(layer) for layer in made.layers},
                "size": size_json(made.size()),
                "skipped": table.skipped,
                "left_alone": dict(table.left_alone),
                "weights": table.weights,
                "predicted": None if comparison is None else {**vars(comparison), "worse": comparison.worse},
            }
            for made, file, comparison in zip(plans, files, comparisons, strict=True)
        ]
        print_json(documents if len(plans) > 1 else documents[0])
        return
    out = console()
    for made, file, comparison in zip(plans, files, comparisons, strict=True):
        out.print(plan_head(made), soft_wrap=True)
        out.print(bits_summary(made, made.size()))
        for line in size_lines(made.size()):
            out.print(line, soft_wrap=True)
        out.print(comparison.text() if comparison is not None else UNCOMPARED, soft_wrap=True)
        say_written(file, "plan")
    say_left_alone(table)


@cli.command(epilog="Example: mpq show plan.json")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def show(file: Path, as_json: bool) -> None:
    """Show a plan layer by layer with its true size, or a table's errors."""
    from .plans.plan import Plan
    from .plans.table import LayerTable, is_table
    from .report.console import console
    from .report.tables import (
        layer_json,
        measurement_table,
        plan_head,
        plan_table,
        size_json,
        size_lines,
    )

    out = console()
    if is_table(file):
        table = LayerTable.load(file)
        if as_json:
            raise click.UsageError(f"{file} is a table: `mpq measure --json` prints its numbers")
        out.print(measurement_table(table))
        return
    loaded = Plan.load(file)
    if as_json:
        layers = {layer.name: layer_json(layer) for layer in loaded.layers}
        print_json({"plan": loaded.model_dump(mode="json"), "layers": layers, "size": size_json(loaded.size())})
        return
    out.print(plan_head(loaded), soft_wrap=True)
    out.print(plan_table(loaded))
    for line in size_lines(loaded.size()):
        out.print(line, soft_wrap=True)


@cli.command(epilog="Example: mpq diff uniform4.json mixed.json")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@json_option
def diff(before: Path, after: Path, as_json: bool) -> None:
    """Show the layers in which two plans differ, and what that costs."""
    from .plans.plan import Plan
    from .report.console import console
    from .report.tables import bytes_text, diff_table, layer_json, size_json

    first, second = Plan.load(before), Plan.load(after)
    differences = first.diff(second)
    if as_json:
        changes = {d.name: {"before": layer_json(d.before), "after": layer_json(d.after)} for d in differences}
        print_json({"layers": changes, "size": [size_json(first.size()), size_json(second.size())]})
        return
    out = console()
    if differences:
        out.print(diff_table(differences))
    out.print(f"{len(differences)} of {len(set(first.by_name) | set(second.by_name))} layers differ", soft_wrap=True)
    for name, size in ((before, first.size()), (after, second.size())):
        out.print(
            f"{name}: {bytes_text(size.total_bytes)} in total, {size.total_average_bits:.3f} bits a weight "
            f"({size.average_bits:.3f} weights only)",
            soft_wrap=True,
        )


cli.add_command(compress)
cli.add_command(decompress)
cli.add_command(inspect)
cli.add_command(pareto)
cli.add_command(reconstruct)
cli.add_command(sweep)
cli.add_command(tune)


@cli.command(
    epilog="Examples: mpq check plan.json model.safetensors. mpq check plan.json SOURCE --backend fx -o legal.json"
)
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.argument("source")
@click.option("--backend", help="Also list what this backend would have to change; `mpq plugins` lists adapters.")
@click.option("--policy", default="up", show_default=True, help="Where a width is missing: up, nearest, or error.")
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
    from .cli_sources import check_output, make_module, resolve_source
    from .plans.plan import Plan
    from .simulation.match import match

    if output is not None and backend is None:
        raise click.UsageError("-o writes the plan as a backend can run it; add --backend")
    check_output(output, plan_file, source)
    claim(output)
    plan = Plan.load(plan_file)
    resolved = resolve_source(source)
    if not isinstance(resolved, Path) and (model_factory, weights) != (None, None):
        raise click.UsageError("--model and --weights say what a checkpoint holds, and SOURCE is a module itself")
    model = make_module(model_factory) if model_factory is not None else None
    found = match(plan, resolved, weights=True, rewrapped=True, key=weights, model=model)
    legal = _legalised(plan, backend, policy) if backend is not None else None
    if legal is not None and output is not None and not found.problems:
        legal[0].save(output)
    if as_json:
        changes = {} if legal is None else {"backend": backend, "changes": [vars(change) for change in legal[1]]}
        print_json({"ok": not found.problems, "problems": found.problems, "notes": found.notes, **changes})
        return BAD_INPUT if found.problems else 0
    found.require(source)
    echo(f"{plan_file} fits {source}: {found.layers} layers, names and shapes agree")
    for note in found.notes:
        say(f"note: {note}")
    if legal is not None:
        _print_changes(plan, legal, str(backend))
    if output is not None:
        echo(f"wrote {output}")
    return 0


def _legalised(plan: Any, backend: str, policy: str) -> Any:
    from .common import registry
    from .plans.legalise import Capabilities, legalise

    capabilities = getattr(registry.load("adapters", backend), "CAPABILITIES", None)
    if not isinstance(capabilities, Capabilities):
        raise PluginError(f"adapters: {backend!r} states no CAPABILITIES, so that no plan can be checked for it")
    return legalise(plan, capabilities, policy)  # type: ignore[arg-type]  # checked there


def _print_changes(plan: Any, legal: Any, backend: str) -> None:
    from .report.console import console
    from .report.tables import bytes_text, changes_table

    legal_plan, changes = legal
    if not changes:
        echo(f"{backend} runs it as it is")
        return
    console().print(changes_table(changes))
    before, after = plan.size().total_bytes, legal_plan.size().total_bytes
    echo(f"{backend}: {len(changes)} changes, {bytes_text(before)} -> {bytes_text(after)} in total")


@cli.command(
    epilog="Examples: mpq apply model.safetensors plan.json -o quantized.safetensors. With statistics and biases "
    "corrected: mpq apply net.pt plan.json --model package.module:factory --calibrate package.module:batches -o q.pt"
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Checkpoint to write.")
@click.option(
    "--calibrate", "calibration", metavar="MODULE:FUNCTION",
    help="Correct BatchNorm statistics and biases on the batches of inputs that this function returns.",
)  # fmt: skip
@click.option(
    "--synthetic", type=IntegerList(), metavar="SHAPE",
    help="Instead of --calibrate, where there are no data: inputs of this shape (samples first: 128,3,32,32) made of "
    "the BatchNorm statistics.",
)  # fmt: skip
@click.option(
    "--model", "model_factory", metavar="MODULE:FACTORY",
    help="The checkpoint's model, which a correction runs; it also says what of the file are layers.",
)  # fmt: skip
@weights_option
@json_option
def apply(
    checkpoint: Path,
    plan_file: Path,
    output: Path,
    calibration: str | None,
    synthetic: tuple[int, ...] | None,
    model_factory: str | None,
    weights: str | None,
    as_json: bool,
) -> None:
    """Write CHECKPOINT with fake-quantized weights, in its own format."""
    from .cli_calibrate import corrected_tensors
    from .cli_sources import check_output, make_module
    from .plans.plan import Plan
    from .report.progress import progress_bar
    from .simulation.checkpoint import rewrite

    check_output(output, checkpoint, plan_file, calibration, model_factory)
    claim(output)
    loaded = Plan.load(plan_file)
    if calibration is not None and synthetic is not None:
        raise click.UsageError("--calibrate and --synthetic both say what to correct on; give one")
    inputs = calibration or synthetic
    if inputs is not None and model_factory is None:
        raise click.UsageError("a correction runs the checkpoint's model: give --model too")
    model = make_module(model_factory) if model_factory is not None else None
    corrected = {}
    if inputs is not None and model is not None:
        corrected = dict(corrected_tensors(checkpoint, loaded, model, str(model_factory), inputs, weights))
    with progress_bar("quantizing") as progress:
        fit = rewrite(checkpoint, loaded, output, progress, corrected=corrected, model=model, weights=weights)
    if fit.found.key is not None:
        say(f"weights: those under {fit.found.key!r}; others in the file are as they were")
    if loaded.activation_bits is not None:
        say(f"note: the plan's {loaded.activation_bits}-bit activations are not in a checkpoint; weights only")
    if as_json:
        print_json({"checkpoint": str(output), "layers": len(loaded.layers), "corrected": sorted(corrected)})
    else:
        others = f"{len(corrected)} biases and statistics corrected, all else" if corrected else "everything else"
        echo(f"wrote {output}: {len(loaded.layers)} layers fake-quantized, {others} as it was")


@cli.command()
@json_option
def plugins(as_json: bool) -> None:
    """List what is installed, importing none of it."""
    from .common.registry import installed
    from .report.console import console
    from .report.tables import plugins_table

    found = installed()
    if as_json:
        print_json([vars(plugin) for plugin in found])
        return
    console().print(plugins_table(found))


@cli.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default="plan.json", show_default=True)
@json_option
def demo(output: Path, as_json: bool) -> None:
    """Quantize a small trained network of handwritten digits every way there is, and write a plan."""
    from .demo.run import demo_json, demo_report, run_demo
    from .report.console import console
    from .report.progress import progress_bar

    claim(output)
    with progress_bar("demo") as progress:
        result = run_demo(progress)
    result.plan.save(output)
    if as_json:
        print_json(demo_json(result) | {"plan": str(output)})
        return
    demo_report(result, console())
    say_written(output, "plan")


if __name__ == "__main__":
    main()
