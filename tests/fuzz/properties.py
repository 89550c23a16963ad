"""The property tests on inputs drawn anew each time, for some minutes: `python -m tests.fuzz.properties --minutes 5`.

As a plugin of pytest (`-p tests.fuzz.properties --minutes 5`) it keeps the tests that hypothesis runs, in another order
each time, and begins none after the time given. As a program it runs two such processes, of one thread each.
"""

import argparse
import os
import random
import subprocess
import sys
import time

import pytest

PROCESSES = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=5.0, help="how long the property tests are drawn anew")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Properties(config.getoption("--minutes")))


class Properties:
    """Keeps the property tests, shuffled, and leaves out those whose turn comes when the time is over."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.left = 0

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = [item for item in items if getattr(getattr(item, "obj", None), "is_hypothesis_test", False)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        random.SystemRandom().shuffle(kept)
        items[:] = kept

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> bool | None:
        if time.monotonic() < self.end:
            return None
        self.left += 1
        return True

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"{self.left} properties were not reached in time")


def main() -> int:
    """Run the processes side by side; 1 where one of them saw a property fail."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.properties", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    minutes = str(parser.parse_args().minutes)
    command = [sys.executable, "-m", "pytest", "-p", "tests.fuzz.properties", "--minutes", minutes]
    command += ["--hypothesis-profile=fuzz", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(command, env=environment) for _ in range(PROCESSES)]
    return max(process.wait() != 0 for process in running)


if __name__ == "__main__":
    sys.exit(main())
