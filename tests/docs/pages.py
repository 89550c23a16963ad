"""The pages of the manual, and the fenced blocks in them, with what comments say of each.

A comment that readers do not see stands on a line of its own before the block it is about:

    <!-- not run: why -->   the block is shown and not run
    <!-- printed -->        the block is what the one before it prints, 120 columns wide; a line of three dots stands
                            for any lines, and an ellipsis for any text

Blocks of Python and of commands that have neither are run. One with a title, ```python title="mine.py", is a file.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MANUAL = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, *MANUAL, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

BLOCK = re.compile(
    r"(?:^<!-- (?P<said>[^\n]*?) -->\n\n?)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
INCLUDED = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what a comment before it says, its file's name, its text, and its line."""

    language: str
    said: str
    title: str
    text: str
    line: int

    @property
    def runs(self) -> bool:
        return self.language in ("python", "bash") and not self.title and not self.said.startswith("not run:")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in order, with what they include from other files."""
    text = page.read_text()
    return [
        Block(
            found["language"],
            found["said"] or "",
            found["title"] or "",
            INCLUDED.sub(lambda named: (ROOT / named[1]).read_text().rstrip(), found["text"]),
            text.count("\n", 0, found.start("language")) + 1,
        )
        for found in BLOCK.finditer(text)
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCED.sub("", page.read_text())


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))
