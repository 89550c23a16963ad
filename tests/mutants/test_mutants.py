"""That the small changes are changes, of what runs and nothing else, and that verdicts are kept."""

import ast
import random
from pathlib import Path

import pytest

from tests.mutants.changes import changes, walk
from tests.mutants.related import code_files, related
from tests.mutants.verdicts import Kept, Verdict, equivalents, table

ROOT = Path(__file__).parents[2]


def lines_after(text: str) -> list[str]:
    return [change.described(text)[1] for change in changes("file.py", text)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a < b", ["a <= b"]),
        ("(a) >= (b)", ["(a) > (b)"]),
        ("a == b != c", ["a != b != c", "a == b == c"]),
        ("a is not None", ["a is None"]),
        ("a in b", ["a not in b"]),
        ("a and b", ["a or b"]),
        ("not a", ["(a)"]),
        ("-a", ["(a)"]),
        ("a + b", ["a - b"]),
        ("a * b", ["a / b"]),
        ("x = 3", ["x = 2", "x = 4"]),
        ("x = 0", ["x = (-1)", "x = 1"]),
        ("x = 0.5", ["x = 1.0"]),
        ("x = min(a)", ["x = max(a)"]),
        ("x = a.max(b)", ["x = a.min(b)"]),
        ("call(a)", ["pass"]),
        ("a += b", ["pass"]),
        ("raise a", ["pass"]),
        ("x = zip(a, strict=True)", []),
        ("x = True", ["x = False"]),
        ("x: Literal[1]", []),
        ("def f(a: Literal[1] = b) -> Literal[2]: ...", []),
        ("'text' + a", []),
        ("'text'", []),
        ("f'{a + 1}'", []),
        ("é = a < b", ["é = a <= b"]),
        ("x = b if a else c", ["x = b if not (a) else c"]),
    ],
)
def test_a_line_becomes(line: str, expected: list[str]) -> None:
    assert sorted(lines_after(line)) == sorted(expected)


def test_a_statement_over_lines_is_named_by_its_first() -> None:
    (change,) = changes("file.py", "call(\n    a,\n)\nb\n")
    assert change.described("call(\n    a,\n)\nb\n") == ("call(", "pass")
    assert change.made_in("call(\n    a,\n)\nb\n") == "pass\nb\n"


def test_every_change_of_the_code_is_one() -> None:
    files = {file: (ROOT / file).read_text() for file in code_files(ROOT)}
    every = list(walk(files))
    assert len(every) > 3000
    for change in random.Random(0).sample(every, 60):
        text = files[change.file]
        assert ast.dump(ast.parse(change.made_in(text))) != ast.dump(ast.parse(text)), change.described(text)


def test_every_file_has_tests() -> None:
    assert [file for file in code_files(ROOT) if not related(ROOT, file)] == []
    assert related(ROOT, "mpq_plugins/allocation/budget_problem.py")[0] == ["tests/allocation/test_budget.py"]


def test_a_survivor_is_tried_again_where_its_tests_are_others(tmp_path: Path) -> None:
    name = ("a.py", "x < y", "x <= y")
    kept = Kept(tmp_path / "deep" / "verdicts.jsonl")
    kept.add(Verdict(*name, "", "code", "tests"))
    again = Kept(kept.path)
    assert again.of(name, "code", "tests") == Verdict(*name, "", "code", "tests")
    assert again.of(name, "code", "other tests") is None
    assert again.of(name, "other code", "tests") is None
    kept.add(Verdict(*name, "tests/test_a.py::test_b", "code", "other tests"))
    known = Kept(kept.path).of(name, "code", "yet other tests")
    assert known is not None
    assert known.noticed == "tests/test_a.py::test_b"


def test_survivors_are_written_as_equivalents_are_read(tmp_path: Path) -> None:
    path = tmp_path / "survivors.toml"
    path.write_text(table([Verdict("a.py", 'x < "y"', 'x <= "y"', "", "", "")]))
    assert equivalents(path) == {("a.py", 'x < "y"', 'x <= "y"'): ""}


def test_every_equivalent_has_a_reason_and_is_of_a_line_that_is_there() -> None:
    for (file, line, changed), reason in equivalents().items():
        assert reason
        assert line != changed
        assert line in [own.strip() for own in (ROOT / file).read_text().splitlines()], (file, line)
