"""`mpq measure`: a model or a checkpoint in, a table out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import SettingError
from ...report.progress import echo
from ..activation_options import range_options, taken_ranges
from ..output import claim, json_option, plot_option, print_json, print_table, say_left_alone, say_written
from ..scheme_options import SchemeCommand, request_values, scheme_options
from ..typed import types_option
from ..types import FileOrFactory, IntegerList, NameList, installed
from ..workers import chosen_executor, worker_options

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from ...allocation.contract import Needs
    from ...plans.activations import Activations
    from ...plans.table import LayerTable
    from ...plans.type_table import TypeTable
    from ..request import Request


def _metrics() -> tuple[str, ...]:
    from ...plans.stats import METRICS

    return METRICS


@click.command(
    cls=SchemeCommand,
    epilog="Example: mpq measure model.safetensors -o model.mpqt, then mpq plan model.mpqt --average-bits 3",
)
@click.argument("source", type=FileOrFactory())
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Table to write; `mpq plan` takes it as SOURCE.")
@click.option("--bits", type=IntegerList(), help="Bit-widths to measure (default: those of the scheme).")
@click.option(
    "--metrics", type=NameList(_metrics), default="relative,mse", show_default=True,
    help="Errors of the weights: relative, mse, rmse, sqnr_db, max_abs.",
)  # fmt: skip
@click.option(
    "--per-channel-errors/--no-per-channel-errors", default=None,
    help="Keep the error of every output channel (default: unless scales are per tensor).",
)  # fmt: skip
@click.option("--input-shape", type=IntegerList(), help="Count MACs for an input of this shape (factory sources).")
@click.option(
    "--sensitivity", "sensitivities", type=installed("sensitivities"), multiple=True,
    help="Also what quantizing each layer does to the outputs; repeatable.",
)  # fmt: skip
@click.option(
    "--activations", is_flag=True,
    help="Also what quantizing each layer's input does, by --sensitivity.",
)  # fmt: skip
@click.option("--input-bits", type=IntegerList(), help="Bit-widths of inputs (default: 2-8,16).")
@range_options
@click.option(
    "--calibrate", "calibration", metavar="MODULE:FUNCTION", help="Returns the batches of inputs that these need."
)
@click.option(
    "--output-of", "output_function", metavar="MODULE:FUNCTION",
    help="Without logits: (model, batch) -> tensor (samples, features).",
)  # fmt: skip
@plot_option
@worker_options("measure", "as torch has")
@click.option("--device", help="Measure with torch on this device, such as cuda.")
@types_option
@scheme_options
@json_option
def measure(
    source: str,
    output: Path | None,
    bits: tuple[int, ...] | None,
    metrics: tuple[str, ...],
    per_channel_errors: bool | None,
    input_shape: tuple[int, ...] | None,
    sensitivities: tuple[str, ...],
    activations: bool,
    input_bits: tuple[int, ...] | None,
    calibration: str | None,
    output_function: str | None,
    workers: int | None,
    dask: str | None,
    device: str | None,
    plot: Path | None,
    types: tuple[str, ...] | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the quantization error of every layer at every bit-width, and on request what it does to outputs.

    Without options the table holds what `mpq plan` needs for its default, Budget: per channel, clipped, 1 to 8 bits.
    With -o, what is finished is kept in FILE.partial until the table is written: interrupted or killed, the
    same command goes on from there.
    """
    from ...common.store import Store
    from ...plans.table import LayerTable
    from ...report.layer_plots import errors_plot, table_title
    from ...report.plots import check_plot
    from ..calibration import OnInputs, check_sensitivities
    from ..measuring import kept_beside, measure_now
    from ..output import check_output
    from ..request import Request
    from ..sources import resolve_source, source_name
    from ..typed import measure_types_now

    if output is not None and output.is_dir():
        raise click.UsageError(f"-o: {output} is a directory; name a file to write")
    inputs = (source, calibration, output_function)
    check_plot(plot)
    check_output(output, *inputs)
    check_output(plot, *inputs, output)
    if output is not None:
        check_output(Store.beside(output).path, *inputs)
    claim(output, "a table")
    claim(plot, "a picture")
    ranges = taken_ranges(options)
    request = Request(**request_values(options))
    given = resolve_source(source)
    _check_asked(sensitivities, activations, calibration, output_function)
    how = _inputs_asked(activations, input_bits, ranges)
    if types is not None:
        _check_types(bits, per_channel_errors, input_shape, plot, activations or None)
    if sensitivities or activations:
        check_sensitivities(given.weights, sensitivities, activations)
    table: LayerTable | TypeTable
    with kept_beside(output) as store:
        with chosen_executor(workers, dask) as executor:
            if types is not None:
                table = measure_types_now(given, types, metrics, request, store=store, executor=executor, device=device)
            else:
                needs = _needs(request, bits, metrics, per_channel_errors)
                table = measure_now(given, needs, request, input_shape, store=store, executor=executor, device=device)
            if calibration is not None:
                run = OnInputs(sensitivities, how, input_bits, calibration, output_function)
                table = run.added(table, given.weights, store, executor)
        if output is not None:
            table.save(output)
    if plot is not None and isinstance(table, LayerTable):
        errors_plot(table, plot, table_title(table, source_name(source)))
    _show(table, output, plot, as_json)


def _needs(
    request: "Request", bits: tuple[int, ...] | None, metrics: tuple[str, ...], per_channel: bool | None
) -> "Needs":
    """What is to be measured where widths are: those that the scheme has, per channel unless scales are per tensor."""
    from ...allocation.contract import Needs
    from ...plans.granular import INTEGER_BITS
    from ...plans.scheme import has_width
    from ..measuring import USUAL

    scheme = request.scheme(USUAL)
    channels = scheme.granularity != "per_tensor" if per_channel is None else per_channel
    return Needs(bits or tuple(b for b in INTEGER_BITS if has_width(scheme, b)), metrics, channels, USUAL)


def _show(table: "LayerTable | TypeTable", output: Path | None, plot: Path | None, as_json: bool) -> None:
    from ...plans.table import LayerTable
    from ...report.inputs import inputs_json

    base = table if isinstance(table, LayerTable) else table.base
    if as_json:
        numbers = _json(table) if isinstance(table, LayerTable) else _types_json(table)
        others = {"skipped": base.skipped, "left_alone": dict(base.left_alone)}
        print_json({"table": str(output) if output else None, **numbers, **inputs_json(base), **others})
        return
    print_table(table)
    say_left_alone(base)
    say_written(output, "table")
    if plot is not None:
        echo(f"wrote {plot}")


def _json(table: "LayerTable") -> dict[str, Any]:
    return {
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
    }  # fmt: skip


def _types_json(table: "TypeTable") -> dict[str, Any]:
    from ...report.types import types_json

    return {"types": [kind.name for kind in table.types], "layers": types_json(table)}


def _check_types(
    bits: tuple[int, ...] | None,
    per_channel: bool | None,
    input_shape: tuple[int, ...] | None,
    plot: Path | None,
    activations: bool | None,
) -> None:
    """Refuse what means nothing with types."""
    given = {
        "--bits": bits, "--per-channel-errors": per_channel, "--input-shape": input_shape, "--plot": plot,
        "--activations": activations,
    }  # fmt: skip
    for option, value in given.items():
        if value is not None:
            raise click.UsageError(f"{option} means nothing with --types: a type has one width and no parts")


def _check_asked(
    sensitivities: tuple[str, ...], activations: bool, calibration: str | None, output_function: str | None
) -> None:
    """Refuse sensitivities without inputs, and what is for sensitivities without one."""
    if activations and calibration is None:
        raise click.UsageError("--activations are measured on inputs: give --calibrate too")
    if sensitivities and calibration is None:
        raise click.UsageError("--sensitivity needs inputs: add --calibrate MODULE:FUNCTION, which returns batches")
    if calibration is not None and not (sensitivities or activations):
        raise click.UsageError("--calibrate is for --sensitivity or --activations alone: add one, or leave it out")
    if output_function is not None and not sensitivities:
        raise click.UsageError("--output-of is what a --sensitivity looks at; give one")


def _inputs_asked(activations: bool, bits: tuple[int, ...] | None, ranges: dict[str, Any]) -> "Activations | None":
    """How inputs are quantized where they are measured. Raises, before the work, for what cannot be."""
    from ...measurement.activations import checked_input_bits
    from ...plans.activations import Activations

    if not activations:
        if bits is not None:
            raise click.UsageError("--input-bits are widths of inputs, which --activations measures; give both")
        if ranges:
            raise SettingError(f"activation-{next(iter(ranges))}: says how inputs are measured; --activations")
        return None
    if bits is not None:
        checked_input_bits(bits, "input-bits")
    return Activations(8, **ranges)  # the width is that of each column
