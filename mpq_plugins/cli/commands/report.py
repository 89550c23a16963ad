"""`mpq report`: a table, and plans beside it, as one page that re-plans in the browser."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import SettingError
from ...report.progress import echo, progress_bar, say
from ..fitting import Fitting, fitting_options
from ..help import SectionCommand
from ..output import check_output, claim, judge_option
from ..types import FileOrFactory

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from ...common.store import Store
    from ...evaluation.sweep import SweepRow
    from ...plans.plan import Plan
    from ...plans.table import LayerTable
    from ...report.page.document import Evaluated, PageDocument
    from ..sources import Source


@click.command(
    cls=SectionCommand,
    epilog="Examples: mpq report net.mpqt -o report.html. Plans beside it: mpq report net.mpqt plan.json -o page.html. "
    "With scores and files: mpq report net.mpqt --model mine.py:net --eval mine.py:score --calibrate mine.py:batches "
    "-o report.html",
)
@click.argument("files", metavar="TABLE|PLAN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--model", "model_factory", type=FileOrFactory(), metavar="SOURCE",
    help="What the table was measured on: shows how weights are distributed.",
)  # fmt: skip
@click.option(
    "--eval", "evaluation", metavar="MODULE:FUNCTION",
    help="Gives each model's score (larger is better), or names and numbers; files are written too.",
)  # fmt: skip
@fitting_options
@judge_option
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Page to write, as report.html.")
def report(
    files: tuple[Path, ...],
    model_factory: str | None,
    evaluation: str | None,
    fitting: Fitting,
    judge: str | None,
    output: Path,
) -> None:
    """Write a page: every allocator's plans, and what becomes of them as sliders move.

    The page is one file that loads nothing. Of a table it shows uniform widths, Budget, MixQuant, PTILMPQ and SQNR by
    size and loss, and the layers of the plan that is chosen. Plans that are given are shown beside these; without a
    table they are shown alone, and nothing is predicted.
    """
    from ...common.files import write_text
    from ...report.page.writer import page_html
    from ..functions import named_function

    check_output(output, *files, model_factory, evaluation, fitting.calibration)
    claim(output, "a page")
    named_function(evaluation) if evaluation is not None else None
    table, file, plans = read_inputs(files)
    page = _page(table, file, plans, _Asked(model_factory, evaluation, fitting, judge), output)
    text = page_html(page)
    write_text(output, text)
    plans_said = f"{len(page.points)} plan{'s' * (len(page.points) != 1)}"
    said = f"{len(page.layers):,} layer{'s' * (len(page.layers) != 1)}, {plans_said}"
    echo(f"wrote {output}: {said}, {len(text.encode()) / 1e3:,.0f} kB")
    for line in page.left_out:
        say(f"note: {line}")


@dataclass(frozen=True)
class _Asked:
    """What is asked beside the files."""

    model: str | None
    evaluation: str | None
    fitting: Fitting
    judge: str | None


def _page(
    table: "LayerTable | None", file: str, plans: "dict[str, Plan]", asked: _Asked, output: Path
) -> "PageDocument":
    from ...report.page.document import page_of_plans, page_of_table, unevaluated
    from ..sources import resolve_source, source_name

    if table is None:
        for option in ("model", "evaluation", "judge"):
            if getattr(asked, option) is not None or asked.fitting.calibrated:
                raise SettingError(f"{option}: is for a table, and only plans are given; add the table: mpq report "
                                   "TABLE PLAN -o report.html")  # fmt: skip
        return page_of_plans(plans, ", ".join(plans))
    for name, plan in plans.items():
        if plan.model != table.fingerprint:
            say(f"note: {name}: was made for other weights than those that {file} was measured on")
    source = resolve_source(asked.model) if asked.model is not None else None
    model = _evaluated_model(source, asked)
    weights = _distributions(source, table) if source is not None else {}
    evaluated: Evaluated = unevaluated
    with _store(output, model) as store:
        if model is not None:
            evaluated = rows_of(model, asked.evaluation, asked.fitting, store)
        return page_of_table(
            table, file, plans, title=source_name(file), judge=asked.judge, evaluated=evaluated, weights=weights
        )


def read_inputs(files: Sequence[Path]) -> "tuple[LayerTable | None, str, dict[str, Plan]]":
    """One table or none, what it is called, and plans by the names of their files.

    Raises SettingError for two tables, or a table of types; FormatError for what is neither table nor plan.
    """
    from ...plans.plan import is_plan
    from ...plans.table import LayerTable
    from .evaluate import named_plans

    plans = tuple(file for file in files if is_plan(file))
    tables = [file for file in files if file not in plans]
    if len(tables) > 1:
        for file in tables:
            LayerTable.load(file)  # says what is wrong with one that is no table
        raise SettingError(f"{tables[1]}: is a table, and {tables[0]} is given already; one table, and any plans")
    table = LayerTable.load(tables[0]) if tables else None
    return table, str(tables[0]) if tables else "", named_plans(plans)


def _evaluated_model(source: "Source | None", asked: _Asked) -> Any:
    """The module to evaluate; None where nothing is evaluated."""
    if asked.evaluation is None:
        if asked.fitting.calibrated or asked.fitting.asked is not None:
            raise SettingError("calibrate: is for models that are evaluated; add --eval package.module:function")
        return None
    if source is None or source.module is None:
        what = "a file" if source is not None else "missing"
        raise SettingError(
            f"model: is {what}, and only a module can be evaluated; name it: --model package.module:factory"
        )
    return source.module


def _distributions(source: "Source", table: "LayerTable") -> Any:
    from ...report.page.distribution import distributions

    with progress_bar("reading") as progress:
        return distributions(source.weights, table, progress)


def rows_of(model: Any, evaluation: str | None, fitting: Fitting, store: "Store | None") -> "Evaluated":
    """What gives plans their scores, with a progress bar."""
    from ...evaluation.sweep import sweep
    from ..functions import named_function

    assert evaluation is not None
    evaluate, batches = named_function(evaluation), fitting.batches(model)

    def rows(
        table: "LayerTable", plans: "Sequence[Plan]", series: Sequence[str], judge: str | None
    ) -> "tuple[SweepRow, ...]":
        from ..runs import check_fit

        check_fit(plans[0], model, "model")
        with progress_bar("evaluating") as progress:
            return sweep(
                table, plans, model, evaluate, series=series, judge=judge, calibrate=batches, rounding=fitting.rounding,
                files=True, store=store, progress=progress,
            )  # fmt: skip

    return rows


@contextmanager
def _store(output: Path, model: Any) -> "Iterator[Store | None]":
    """Where evaluations are kept until the page is written; none where nothing is evaluated."""
    from ..measuring import kept_beside

    with kept_beside(output if model is not None else None) as store:
        yield store
