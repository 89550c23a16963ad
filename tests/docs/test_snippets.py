"""What the manual shows is run, page by page, in a folder that has what docs/index.md says every page has."""

import contextlib
import io
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpq_plugins.cli import main as cli
from tests.docs.pages import PAGES, README, ROOT, Block, blocks, name_of

RUNNING = [page for page in PAGES if any(block.runs for block in blocks(page))]
pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_PAGE = blocks(ROOT / "docs/index.md")[:2]  # mine.py, and what writes its checkpoint


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder a reader works in: on the path, as `mpq` and Python have it, with the files of every page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    before = set(sys.modules)
    for block in EVERY_PAGE:
        run(block, {}, tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING, ids=name_of)
def test_what_a_page_shows_runs_and_prints_what_it_says(page: Path, folder: Path) -> None:
    state: dict[str, object] = {"__name__": "page"}
    printed = ""
    for block in blocks(page):
        where = f"{name_of(page)}:{block.line}"
        if block.said == "printed":
            assert re.fullmatch(expected(block.text), printed), f"{where}: it prints\n{printed}"
        elif block.title or block.runs:
            try:
                printed = run(block, state, folder)
            except Exception as error:
                raise AssertionError(f"{where}: {error}") from error


def run(block: Block, state: dict[str, object], folder: Path) -> str:
    """What a block prints, its trailing blanks taken off; one with a title is written as that file."""
    if block.title:
        (folder / block.title).write_text(block.text)
        return ""
    written = io.BytesIO()
    out = io.TextIOWrapper(written, encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what backends warn of is theirs
        if block.language == "python":
            exec(compile(block.text, "<the manual>", "exec"), state)
        else:
            for command in commands(block.text):
                code = run_command(command)
                assert not code, f"{shlex.join(command)} exits with {code}: {written.getvalue().decode()[-500:]}"
    return "".join(f"{line.rstrip()}\n" for line in written.getvalue().decode().splitlines())


def commands(text: str) -> list[list[str]]:
    """The commands of a block; lines that end in a backslash go on, and `make demo` is what the Makefile has for it."""
    lines = text.replace("\\\n", " ").replace("make demo", demo()).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def demo() -> str:
    """The command behind `make demo`."""
    (found,) = re.findall(r"^demo:.*\n\t\$\(BIN\)/(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return str(found)


def run_command(words: list[str]) -> int:
    """The exit code of `mpq ...`, run in this process."""
    assert words[0] == "mpq", f"{words[0]}: only mpq is run; say <!-- not run: why --> of others"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return int(stop.value.code or 0)


def expected(text: str) -> str:
    """The pattern of what is printed: as it stands, where a line of dots is any lines, and an ellipsis any text."""
    lines = ["(?:.*\n)*?" if line == "..." else f"{re.escape(line)}\n" for line in text.splitlines()]
    return "".join(lines).replace("…", ".*")


def test_the_readme_and_the_manual_run_on_the_same_file() -> None:
    assert blocks(README)[1].title == EVERY_PAGE[0].title == "mine.py"
    assert blocks(README)[1].text == EVERY_PAGE[0].text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_are_fenced_name_their_language_and_say_why_they_are_not_run(page: Path) -> None:
    text = page.read_text()
    for block in blocks(page):
        where = f"{name_of(page)}:{block.line}"
        assert block.language, f"{where}: names no language"
        assert not re.search(r"^\$ ", block.text, re.MULTILINE), f"{where}: a prompt cannot be copied"
        said = block.said.removeprefix("not run:")
        assert block.said in ("", "printed") or (said != block.said and said.strip()), f"{where}: {block.said}"
    assert text.count("\n```") % 2 == 0
    assert not re.search(r"(?:^|\n)\n {4}\$ ", text), "an indented block: fence it"
