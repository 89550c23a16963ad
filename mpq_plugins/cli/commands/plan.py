"""`mpq plan`: a source or a table in, a plan for each allocator out."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import SettingError
from ...report.progress import alert, echo, say
from ..activation_options import activation_options, take_activations
from ..allocator_options import NAME_KEY, AllocatorCommand, allocator_option, allocators_from, usual_taken
from ..fitting import Fitting
from ..output import claim, json_option, judge_option, print_head, print_json, say_left_alone, say_written
from ..scheme_options import request_values, scheme_options
from ..typed import COSTS_OF_ITS_OWN, types_option
from ..types import FileOrFactory

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from ...allocation.guard import Comparison
    from ...plans.activations import Activations
    from ...plans.plan import Plan
    from ...plans.table import LayerTable
    from ..request import Request
    from ..sources import Source

USUAL = "4 bits a weight is what is planned where nothing is asked; ask for less with --average-bits 3 or --size 9MB"
UNASKED = "No limit was given, so it is 4 bits a weight; give --average-bits, --size or another, or one --bits alone."
ONE_CURVE = "not compared with uniform widths: entropy-coded codes have none, and cost what the file says"
OF_INPUTS = "not compared with uniform widths: inputs differ in width, and uniform widths of weights alone say nothing"
UNCOMPARED = "not compared with uniform widths: channels differ in width, and their errors were not measured"


@click.command(
    cls=AllocatorCommand,
    epilog="Examples: mpq plan net.safetensors -o plan.json (Budget, 4 bits a weight). mpq plan SOURCE --size 9MB. "
    "--qem 2 is mixquant, --alpha 0.5 ptilmpq, --bits 4 uniform; mpq plan -a mixquant --help lists its options.",
)
@click.argument("source", type=FileOrFactory())
@allocator_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Plan to write, or a directory for several.")
@click.option("--table", "cache", type=click.Path(path_type=Path), help="Keep the measurement here, and reuse it.")
@activation_options
@judge_option
@types_option
@scheme_options
@json_option
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    source: str,
    allocator: str | None,
    output: Path | None,
    cache: Path | None,
    judge: str | None,
    types: tuple[str, ...] | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Decide the bits of every layer of SOURCE (or of a table that `mpq measure` wrote)."""
    from ...allocation.guard import worse_text
    from ..output import check_ours, check_output
    from ..plans import plan_files, save_plans, untied
    from ..request import Request
    from ..sources import named_files, resolve_source

    activations = take_activations(options)
    request = Request(**request_values(options))
    inputs = (source, *named_files(options))
    check_output(output, *inputs, cache)
    check_output(cache, *inputs)
    claim(output, "a plan")
    assert allocator in (None, ctx.meta[NAME_KEY]), "click and we read --allocator differently"
    allocators = allocators_from(ctx, options, scheme=None)
    given = resolve_source(source)
    measured = _Measured.of(ctx, given, allocators, request, _Asked(types, cache, judge, options))
    plans = _met(given, [_recorded(made, activations) for made in measured.plans], request.weights)
    files = plan_files(plans, output)
    for file in files:
        if output is not None and output.is_dir():
            check_output(file, *inputs, cache)
            check_ours(file, "a plan")
    table = measured.table
    for note in untied(allocators, table):
        say(f"note: {note}")
    comparisons = measured.compared(plans)
    save_plans(plans, files, output)
    for one, comparison in zip(plans, comparisons, strict=True):
        if comparison is not None and comparison.worse:
            alert(f"warning: {worse_text(one, comparison)}")
    made = [_Made(*each) for each in zip(plans, files, comparisons, strict=True)]
    if as_json:
        documents = [each.document(table) for each in made]
        print_json(documents if len(plans) > 1 else documents[0])
        return
    for each in made:
        each.show()
    if usual_taken(ctx, options):
        echo(USUAL)
    say_left_alone(table)


@dataclass(frozen=True)
class _Asked:
    """What is asked of a plan beside its allocators: types, the table's file, the judge, and the options' values."""

    types: tuple[str, ...] | None
    cache: Path | None
    judge: str | None
    options: dict[str, Any]


@dataclass(frozen=True)
class _Measured:
    """A table and what allocators made of it. table: of types the one that all layers are in."""

    table: "LayerTable"
    plans: "list[Plan]"
    judge: str | None
    of_types: bool

    @classmethod
    def of(cls, ctx: click.Context, given: "Source", allocators: Any, request: "Request", asked: _Asked) -> "_Measured":
        """Measure, or read, and plan. What cannot be met where nothing was asked says so; raises as allocators do."""
        from ..typed import planned_types

        of_types = asked.types is not None or given.has_types
        if of_types and (asked.judge is not None or asked.cache is not None):
            option = "judge" if asked.judge is not None else "table"
            raise SettingError(f"{option}: means nothing with types; leave it out (mpq measure --types keeps a table)")
        try:
            if not of_types:
                return cls._of_widths(given, allocators, request, asked)
            types, plans = planned_types(given, asked.types, allocators, request)
        except SettingError as error:
            if not usual_taken(ctx, asked.options):
                raise
            raise SettingError(f"{str(error).removesuffix('.')}. {UNASKED}") from error
        return cls(types.base, plans, None, True)

    @classmethod
    def _of_widths(cls, given: "Source", allocators: Any, request: "Request", asked: _Asked) -> "_Measured":
        from dataclasses import replace

        from ..measuring import measured
        from ..plans import joint_needs, plans_by

        needs = joint_needs(allocators)
        if request.scheme(needs.scheme).granularity != "per_tensor" and not given.is_table:
            needs = replace(needs, channel_errors=True)  # what parts will cost, for the comparison
        table = measured(given, needs, request, asked.cache)
        return cls(table, plans_by(allocators, table), asked.judge, False)

    def compared(self, plans: "list[Plan]") -> "list[Comparison | None]":
        """How each compares with uniform widths; None where it cannot be."""
        from ...allocation.guard import compare, judge_of

        if self.of_types:
            return [None] * len(plans)
        judge = judge_of(self.table, plans, self.judge)
        return [None if judge is None else compare(self.table, made, judge) for made in plans]


def _recorded(plan: "Plan", activations: "Activations | None") -> "Plan":
    """The plan with all inputs quantized so, where that is asked. Raises SettingError where it has its own."""
    if activations is None:
        return plan
    if plan.quantizes_inputs:
        raise SettingError("activation_bits: --input-bits gives each input its own width; leave out one of the two")
    return plan.with_activations(activations)


def _met(source: "Source", plans: "list[Plan]", weights: str | None) -> "list[Plan]":
    """Those for a file's bytes with steps that meet them, as far as there are weights to write."""
    from ...plans.steps import steps_of
    from ..file_budget import fitted_to_file

    if source.is_table:
        return plans
    return [fitted_to_file(source, made, Fitting(), weights, None)[1] if steps_of(made) else made for made in plans]


@dataclass(frozen=True)
class _Made:
    """A plan, the file it went into, and how it compares with uniform widths."""

    plan: "Plan"
    file: Path | None
    comparison: "Comparison | None"

    def document(self, table: "LayerTable") -> dict[str, Any]:
        """Everything, for `--json`."""
        from ...report.tables import layer_json, size_json

        found = self.comparison
        return {
            "plan": str(self.file) if self.file else None,
            "allocator": self.plan.allocator.model_dump(),
            "layers": {layer.name: layer_json(layer) for layer in self.plan.layers},
            "size": size_json(self.plan.size()),
            "skipped": table.skipped,
            "left_alone": dict(table.left_alone),
            "weights": table.weights,
            "predicted": None if found is None else {**vars(found), "worse": found.worse},
        }

    def show(self) -> None:
        """What a person wants to know."""
        from ...report.console import console
        from ...report.tables import bits_summary, file_lines, size_lines

        out = console()
        print_head(out, self.plan)
        out.print(bits_summary(self.plan, self.plan.size()))
        for line in (*size_lines(self.plan.size()), *file_lines(self.plan)):
            out.sentence(line)
        out.sentence(self.comparison.text() if self.comparison is not None else self._uncompared())
        say_written(self.file, "plan")

    def _uncompared(self) -> str:
        """Why there is no comparison."""
        if "types" in self.plan.allocator.found:
            return COSTS_OF_ITS_OWN
        if len({layer.activation_bits for layer in self.plan.layers} - {None}) > 1:
            return OF_INPUTS
        return ONE_CURVE if any(layer.coded_bytes is not None for layer in self.plan.layers) else UNCOMPARED
