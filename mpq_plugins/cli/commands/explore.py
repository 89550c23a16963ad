"""`mpq explore`: the page of a source, served to this machine, with exact plans and evaluations behind it."""

import tempfile
import webbrowser
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...report.progress import echo, say
from ..fitting import Fitting, fitting_options
from ..output import check_output, judge_option, run_model_option
from ..runs import model_to_evaluate
from ..scheme_options import SchemeCommand, request_values, scheme_options
from ..types import FileOrFactory

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from ...plans.table import LayerTable
    from ...report.page.answers import Answers
    from ..sources import Source


@click.command(
    cls=SchemeCommand,
    epilog="Examples: mpq explore net.mpqt. mpq explore mine.py:net --table net.mpqt --eval mine.py:score --calibrate "
    "mine.py:batches. Ctrl-C ends it.",
)
@click.argument("source", type=FileOrFactory())
@click.option(
    "--eval", "evaluation", metavar="MODULE:FUNCTION",
    help="Gives each model's score (larger is better), or names and numbers.",
)  # fmt: skip
@run_model_option
@fitting_options
@judge_option
@click.option("--table", "cache", type=click.Path(path_type=Path), help="Keep the measurement here, and reuse it.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on (default: any that is free).")
@click.option("--no-browser", is_flag=True, help="Say where the page is, and open nothing.")
@scheme_options
def explore(
    source: str,
    evaluation: str | None,
    model_factory: str | None,
    fitting: Fitting,
    judge: str | None,
    cache: Path | None,
    port: int,
    no_browser: bool,
    **options: Any,
) -> None:
    """Serve the page of SOURCE (or of its table) on this machine, until Ctrl-C.

    It is what `mpq report` writes, and more: Budget is solved exactly, and plans are evaluated. The server listens on
    127.0.0.1 alone, under a path that nobody else knows, and answers no other page.
    """
    from ...report.page.document import page_of_table
    from ...report.page.server import PageServer
    from ...report.page.writer import page_html
    from ..request import Request
    from ..sources import resolve_source, source_name

    check_output(cache, source, evaluation, fitting.calibration, model_factory)
    given = resolve_source(source)
    request = Request(**request_values(options))
    model = model_to_evaluate(given, evaluation, model_factory)
    table, file = _table(given, request, cache)
    page = page_of_table(table, file, {}, title=source_name(source), judge=judge)
    with ExitStack() as stack:
        answers = _answers(table, file, page, _evaluator(stack, model, evaluation, fitting))
        with PageServer(port, answers, lambda base: page_html(page, _served(base, answers))) as server:
            echo(f"serving {server.url} until Ctrl-C", at_once=True)  # nothing that sticks to the address
            if not no_browser:
                webbrowser.open(server.url)
            server.serve_forever()


def _served(base: str, answers: "Answers") -> dict[str, Any]:
    """What the page is told of its server."""
    return {"base": base, "evaluates": answers.evaluated is not None, "parts": answers.by_channel}


def _table(given: "Source", request: Any, cache: Path | None) -> "tuple[LayerTable, str]":
    """The table, measured now where the source is none, and what commands call it."""
    from ...allocation.contract import Needs
    from ..measuring import USUAL, measured

    if given.is_table:
        return measured(given, Needs((), ()), request, cache), given.text
    granular = request.scheme(USUAL).granularity != "per_tensor"
    table = measured(given, Needs(tuple(range(1, 9)), ("mse", "relative"), granular, USUAL), request, cache)
    if cache is None:
        say("note: commands on the page name TABLE; --table FILE keeps the measurement, and they name that")
    return table, str(cache) if cache is not None else "TABLE"


def _evaluator(stack: ExitStack, model: Any, evaluation: str | None, fitting: Fitting) -> Any:
    """What evaluates plans, each once for as long as the server runs; None without --eval."""
    from ...common.store import Store
    from ...report.page.answers import evaluator
    from ..functions import named_function
    from ..runs import batches_to_fit_on

    batches = batches_to_fit_on(fitting, model)
    if model is None or evaluation is None:
        return None
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpq-explore-")))
    store = stack.enter_context(Store(folder / "evaluations"))
    return evaluator(model, named_function(evaluation), batches, fitting.rounding, store)


def _answers(table: "LayerTable", file: str, page: Any, evaluated: Any) -> "Answers":
    from ...report.page.answers import Answers

    judge = page.measured.judge
    return Answers(table, file, judge, tuple(point.plan for point in page.points), evaluated)
