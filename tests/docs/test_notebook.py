"""The notebook runs, and shows what is kept in it. `python -m tests.docs.test_notebook` runs it and keeps that anew."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.notebooks import outputs, run_cells

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tour.ipynb"


def kept() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(NOTEBOOK.read_text())
    return loaded


@pytest.mark.usefixtures("one_thread")
def test_the_notebook_runs_and_shows_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = kept()
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell, run in zip(code, run_cells(notebook), strict=True):
        assert shape_of(list(outputs(run))) == shape_of(cell["outputs"]), run.source


def shape_of(found: list[Any]) -> list[Any]:
    """Outputs without the last digits of numbers, which another processor may round otherwise."""
    texts = ["".join(one.get("text") or one["data"]["text/html"]) for one in found]
    return [re.sub(r"rgb\([^)]*\)", "", re.sub(r"\d+(\.\d+)?(e-?\d+)?", rounded, text)) for text in texts]


def rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2g}"


def write() -> None:
    """Run the notebook, and keep what it shows."""
    notebook = kept()
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell, run in zip(code, run_cells(notebook), strict=True):
        cell["outputs"] = outputs(run)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write()
