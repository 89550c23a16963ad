"""What was found about each change, kept so that an interrupted run goes on; and the changes that change nothing."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

EQUIVALENT = Path(__file__).with_name("equivalent.toml")


@dataclass(frozen=True)
class Verdict:
    """One change and the test that noticed it, "" where none did."""

    file: str
    line: str
    changed: str
    noticed: str
    code: str  # digest of the changed file
    tests: str  # digest of the test files

    @property
    def name(self) -> tuple[str, str, str]:
        return self.file, self.line, self.changed


class Kept:
    """Verdicts of earlier runs, a line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self._all = [Verdict(**json.loads(line)) for line in lines if line.endswith("}")]

    def add(self, verdict: Verdict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(verdict)) + "\n")

    def of(self, name: tuple[str, str, str], code: str, tests: str) -> Verdict | None:
        """What is known of this change; a survivor is tried again where the tests are others."""
        for verdict in reversed(self._all):
            if verdict.name == name and verdict.code == code and (verdict.noticed or verdict.tests == tests):
                return verdict
        return None


def equivalents(path: Path = EQUIVALENT) -> dict[tuple[str, str, str], str]:
    """{(file, line, the line changed): why the change is none}."""
    entries = tomllib.loads(path.read_text()).get("equivalent", [])
    return {(entry["file"], entry["line"], entry["changed"]): entry["reason"] for entry in entries}


def table(verdicts: Sequence[Verdict]) -> str:
    """The survivors as they are written down in the file of equivalents, for where they are found to be such."""
    lines = [f"# {len(verdicts)} changes that no related test noticed"]
    for verdict in verdicts:
        lines += ["", "[[equivalent]]", f"file = {json.dumps(verdict.file)}", f"line = {json.dumps(verdict.line)}",
                  f"changed = {json.dumps(verdict.changed)}", 'reason = ""']  # fmt: skip
    return "\n".join(lines) + "\n"
