"""Notebooks run cell by cell, as Jupyter does, without Jupyter."""

import ast
import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CellRun:
    """What a cell printed, and what it showed: the HTML of its last expression, if it has any."""

    source: str
    printed: str
    shown: str | None


def run_cells(notebook: Mapping[str, Any]) -> Iterator[CellRun]:
    """Run the code cells in their order, in one namespace."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            yield _run("".join(cell["source"]), names, f"<cell {number}>")


def outputs(run: CellRun) -> Sequence[Mapping[str, Any]]:
    """As a notebook's file has them."""
    found: list[Mapping[str, Any]] = []
    if run.printed:
        found.append({"name": "stdout", "output_type": "stream", "text": run.printed.splitlines(keepends=True)})
    if run.shown is not None:
        data = {"text/html": [run.shown]}
        found.append({"data": data, "execution_count": None, "metadata": {}, "output_type": "execute_result"})
    return found


def _run(source: str, names: dict[str, Any], where: str) -> CellRun:
    tree = ast.parse(source, where)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    value = None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
    html = getattr(value, "_repr_html_", None)
    return CellRun(source, printed.getvalue(), None if html is None else html())
