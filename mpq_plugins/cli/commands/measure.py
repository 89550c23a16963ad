"""`mpq measure`: a model or a checkpoint in, a table out."""

from pathlib import Path
from typing import Any

import click

from ..output import claim, json_option, print_json, say_left_alone, say_written
from ..scheme_options import SchemeCommand, request_values, scheme_options
from ..types import FileOrFactory, IntegerList, NameList, installed


def _metrics() -> tuple[str, ...]:
    from ...plans.stats import METRICS

    return METRICS


@click.command(
    cls=SchemeCommand,
    epilog="Example: mpq measure model.safetensors -o model.mpqt, then mpq plan model.mpqt --average-bits 3",
)
@click.argument("source", type=FileOrFactory())
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Table to write; `mpq plan` takes it as SOURCE.")
@click.option("--bits", type=IntegerList(), default="1-8", show_default=True, help="Bit-widths to measure.")
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
    metrics: tuple[str, ...],
    per_channel_errors: bool | None,
    input_shape: tuple[int, ...] | None,
    sensitivities: tuple[str, ...],
    calibration: str | None,
    output_function: str | None,
    workers: int | None,
    dask: str | None,
    device: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the quantization error of every layer at every bit-width, and on request what it does to outputs.

    Without options the table holds what `mpq plan` needs for its default, Budget: per channel, clipped, 1 to 8 bits.
    With -o, what is finished is kept in FILE.partial until the table is written: interrupted or killed, the
    same command goes on from there.
    """
    from ...allocation.contract import Needs
    from ...common.store import Store
    from ...report.console import console
    from ...report.tables import measurement_table
    from ..calibration import check_sensitivities, with_sensitivities
    from ..measuring import USUAL, kept_beside, measure_now
    from ..output import check_output
    from ..request import Request
    from ..sources import resolve_source
    from ..workers import chosen_executor

    if output is not None and output.is_dir():
        raise click.UsageError(f"-o: {output} is a directory; name a file to write")
    inputs = (source, calibration, output_function)
    check_output(output, *inputs)
    if output is not None:
        check_output(Store.beside(output).path, *inputs)
    claim(output)
    request = Request(**request_values(options))
    if per_channel_errors is None:
        per_channel_errors = request.scheme(USUAL).granularity != "per_tensor"
    needs = Needs(bits, metrics, per_channel_errors, USUAL)
    given = resolve_source(source)
    if bool(sensitivities) != (calibration is not None):
        raise click.UsageError("--sensitivity needs inputs, and inputs are for nothing else: give it and --calibrate")
    if output_function is not None and not sensitivities:
        raise click.UsageError("--output-of is what a --sensitivity looks at; give one")
    if sensitivities:
        check_sensitivities(given.weights, sensitivities)
    with kept_beside(output) as store:
        with chosen_executor(workers, dask) as executor:
            table = measure_now(
                given,
                needs,
                request,
                input_shape,
                store=store,
                executor=executor,
                device=device,
            )
        if calibration is not None:
            table = with_sensitivities(table, given.weights, sensitivities, calibration, output_function, store)
        if output is not None:
            table.save(output)
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
