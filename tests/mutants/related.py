"""Which test files are for a file of code: the one of its name first, then those of its package."""

import re
from pathlib import Path

CODE = (
    "mpq_plugins/allocation", "mpq_plugins/quantization", "mpq_plugins/plans", "mpq_plugins/simulation",
    "mpq_plugins/compression", "adapters",
)  # fmt: skip
# The second compressor's API lives in an environment of its own, which is not this one.
ELSEWHERE = "adapters/inc_classic"


def code_files(root: Path) -> list[str]:
    """The files that are changed, from the root."""
    files = (str(file.relative_to(root)) for part in CODE for file in (root / part).rglob("*.py"))
    return sorted(file for file in files if not file.startswith(ELSEWHERE))


def related(root: Path, file: str) -> list[list[str]]:
    """Groups of test files, to be run in turn until one notices."""
    parts = Path(file).with_suffix("").parts
    there = _adapters_tests(root, parts[1]) if parts[0] == "adapters" else _tests_in(root, f"tests/{parts[1]}")
    name = parts[1] if parts[0] == "adapters" else parts[-1]
    first = [test for test in there if f"/{name}/" in test or name.startswith(Path(test).stem.removeprefix("test_"))]
    return [group for group in (first, [test for test in there if test not in first]) if group]


def _tests_in(root: Path, folder: str) -> list[str]:
    return sorted(
        str(test.relative_to(root)) for test in (root / folder).rglob("test_*.py") if "classic" not in str(test)
    )


def _adapters_tests(root: Path, name: str) -> list[str]:
    """All tests that import this adapter; all there are for what adapters share."""
    tests = _tests_in(root, "tests/adapters")
    if not (root / "adapters" / name).is_dir() or name == "shared":
        return tests
    imports = re.compile(rf"adapters(\.| import .*\b){name}\b")
    return [test for test in tests if imports.search((root / test).read_text())]
