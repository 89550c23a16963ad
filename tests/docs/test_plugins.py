"""The packages under examples/plugins are what docs/extending.md shows: installed, found, and their own tests pass."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Ran
from tests.docs.pages import ROOT
from tests.helpers.distributions import install

PACKAGES = sorted(path.parent for path in (ROOT / "examples" / "plugins").glob("*/pyproject.toml"))
Mpq = Callable[..., Ran]


def installed(package: Path, site: Path) -> tuple[str, str]:
    """Put a package where an installer would; returns its group and its plugin's name."""
    project = tomllib.loads((package / "pyproject.toml").read_text())
    name = project["project"]["name"]
    (module,) = project["tool"]["setuptools"]["py-modules"]
    assert module == name.replace("-", "_")
    ((group, points),) = project["project"]["entry-points"].items()
    targets = {plugin: target.partition(":")[2] for plugin, target in points.items()}
    group = group.removeprefix("mpq_plugins.")
    install(site, name, (package / f"{module}.py").read_text(), {group: targets})
    ((plugin, _),) = points.items()
    return group, plugin


def test_there_is_one_for_each_contract(tmp_path: Path) -> None:
    groups = {installed(package, tmp_path)[0] for package in PACKAGES}
    assert groups == {"allocators", "schemes", "sensitivities", "adapters"}


@pytest.mark.slow
def test_their_own_tests_pass_where_they_are_installed(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for package in PACKAGES:
        installed(package, site)
        for test in package.glob("test_*.py"):
            (tmp_path / test.name).write_text(test.read_text())
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(
        run, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout.splitlines()[-1]


def test_the_allocator_plans_by_its_options(mpq: Mpq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (package,) = [path for path in PACKAGES if path.name == "allocator"]
    installed(package, tmp_path)
    source = "mpq_plugins.cli.demo.net:digit_net"
    ran = mpq("plan", source, "-a", "within", "--most", "0.1", "-o", tmp_path / "plan.json")
    assert ran.code == 0, ran.err
    assert "within" in mpq("plugins").out
