"""`mpq plan`: a source or a table in, a plan for each allocator out."""

from pathlib import Path
from typing import Any

import click

from ...report.progress import alert, say
from ..allocator_options import NAME_KEY, AllocatorCommand, allocator_option, allocators_from
from ..output import claim, json_option, print_head, print_json, say_left_alone, say_written
from ..scheme_options import request_values, scheme_options
from ..types import FileOrFactory

UNCOMPARED = "not compared with uniform widths: channels differ in width, and their errors were not measured"


@click.command(
    cls=AllocatorCommand,
    epilog="An allocator's own options follow --allocator: mpq plan --allocator uniform --help. Repeat one for a "
    "plan each from one measurement: mpq plan SOURCE --qem 2 --qem 3 -o plans",
)
@click.argument("source", type=FileOrFactory())
@allocator_option
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

    from ...allocation.guard import compare, worse_text
    from ...report.console import console
    from ...report.tables import bits_summary, layer_json, size_json, size_lines
    from ..measuring import measured
    from ..output import check_output
    from ..plans import joint_needs, plan_files, plans_by, save_plans, untied
    from ..request import Request
    from ..sources import named_files, resolve_source

    request = Request(**request_values(options))
    inputs = (source, *named_files(options))
    check_output(output, *inputs, cache)
    check_output(cache, *inputs)
    claim(output)
    assert allocator == ctx.meta[NAME_KEY], "click and we read --allocator differently"
    allocators = allocators_from(ctx, options, scheme=None)
    needs = joint_needs(allocators)
    given = resolve_source(source)
    if request.scheme(needs.scheme).granularity != "per_tensor" and not given.is_table:
        needs = replace(needs, channel_errors=True)  # what parts will cost, for the comparison
    table = measured(given, needs, request, cache)
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
            alert(f"warning: {worse_text(made, comparison)}")
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
        print_head(out, made)
        out.print(bits_summary(made, made.size()))
        for line in size_lines(made.size()):
            out.sentence(line)
        out.sentence(comparison.text() if comparison is not None else UNCOMPARED)
        say_written(file, "plan")
    say_left_alone(table)
