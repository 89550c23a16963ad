"""The table of what backends run says what their CAPABILITIES do."""

import re

import pytest

from mpq_plugins.common import registry
from tests.docs.pages import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")  # what backends warn of is theirs

ROW = re.compile(r"^\|(.+)\|$", re.MULTILINE)


def rows() -> list[list[str]]:
    """The table's cells, its heading first."""
    text = (ROOT / "docs/backends/index.md").read_text()
    table = text[text.index("| | fx |") :].split("\n\n")[0]
    return [[cell.strip() for cell in row.split("|")] for row in ROW.findall(table) if "---" not in row]


HEADING, *ROWS = rows()


@pytest.mark.parametrize("backend", HEADING[1:])
def test_a_backend_runs_what_the_table_says_and_nothing_else(backend: str) -> None:
    found = registry.load("adapters", backend).CAPABILITIES
    runs = {*found.kinds, *found.granularities, *found.schemes}
    said = {name for row in ROWS if row[HEADING.index(backend)] for name in re.findall(r"`(\w+)`", row[0])}
    assert said == runs
    inputs = [row[HEADING.index(backend)] for row in ROWS if row[0].startswith("inputs in")]
    assert [bool(cell) for cell in inputs] == [None in found.activation_bits, 8 in found.activation_bits]
    assert found.bits == tuple(range(1, 9))
    assert found.parts
