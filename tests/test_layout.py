"""The shape of the project: packages, the wheel, the direction of imports, the public surface."""

import ast
import json
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import mpq_plugins

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Left to right, as data flows; a part imports only its own layer and those before it.
FLOW = (
    (
        "activation_ranges",
        "buffers",
        "channels",
        "checksum",
        "documents",
        "duplicate",
        "errors",
        "files",
        "fingerprint",
        "interrupts",
        "journal",
        "metadata",
        "outsiders",
        "parameters",
        "patterns",
        "plain",
        "layer",
        "scheme",
        "terminal",
        "text",
        "validation",
        "wrappers",
    ),
    ("quantize",),
    (
        "averages",
        "batches",
        "borrowed",
        "checkpoints",
        "file_kinds",
        "fold",
        "handles",
        "not_layers",
        "packed",
        "registry",
        "roles",
        "scaled",
        "shards",
        "state_dicts",
        "stored_weights",
        "tensor_files",
        "torch_files",
        "tracing",
        "weights",
    ),
    ("table", "table_file"),
    ("measure",),
    ("plan", "objective", "plan_error", "size"),
    ("allocate", "guard", "legalise"),
    ("lower", "match", "simulate"),
    ("apply", "behaviour", "correct", "correction", "rewrite", "synthetic"),
    ("reconstruct",),
    ("compress",),
    ("scores",),
    ("pareto", "sweep", "tuning"),
    ("adapters",),
    ("report",),
    (
        "demo",
        "cli_calibrate",
        "cli_compress",
        "cli_options",
        "cli_pareto",
        "cli_partial",
        "cli_plans",
        "cli_reconstruct",
        "cli_runs",
        "cli_shared",
        "cli_sources",
        "cli_sweep",
        "cli_tune",
        "cli_workers",
        "cli",
        "__main__",
    ),
)


def packages_in_the_tree() -> set[str]:
    found = {"mpq_plugins.adapters"}
    for init in (ROOT / "mpq_plugins").rglob("__init__.py"):
        found.add(".".join(init.parent.relative_to(ROOT).parts))
    return found


def test_every_package_is_listed() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_in_the_tree()


def test_the_top_level_is_what_was_agreed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    allowed = {"pyproject.toml", "README.md", "mpq_plugins", "adapters", "tests", "examples"}
    beside = {"Makefile", "LICENSE", "CHANGELOG.md", "constraints.txt"}
    assert {name for name in top if not name.startswith(".")} <= allowed | beside


def test_adapters_refuse_another_name() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import adapters"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "import mpq_plugins.adapters" in run.stderr.splitlines()[-1]


def test_every_direct_dependency_is_pinned() -> None:
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [
        *PROJECT["project"]["dependencies"],
        *(d for name, own in extras.items() if name != "inc-classic" for d in own),
    ]
    names = {requirement.split("[")[0].split("<")[0].split(">")[0] for requirement in wanted}
    assert names - {"mpq-plugins"} <= pinned


def test_the_wheel_holds_everything_and_imports_under_its_own_name(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, for building leaves a folder behind that the next build would pick up
    for name in ("mpq_plugins", "adapters"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    fresh = tmp_path / "venv"
    venv.create(fresh, with_pip=False)
    (site,) = (fresh / "lib").glob("python*/site-packages")
    subprocess.run([sys.executable, "-m", "pip", "--python", str(fresh / "bin" / "python"), "install", "--no-deps",
                    "--quiet", str(wheel)], check=True)  # fmt: skip
    # The dependencies are this environment's; a plain path brings them without our editable install's hook.
    (site / "dependencies.pth").write_text(f"{site_packages()}\n")
    # The classic Neural Compressor is in an environment of its own, whose tests import these.
    modules = [name for name in wheel_modules(wheel) if not name.endswith("__main__") and "inc_classic" not in name]
    assert len(modules) > 30
    code = f"import importlib, mpq_plugins\nfor m in {modules}: importlib.import_module(m)\nprint(mpq_plugins.__file__)"
    done = subprocess.run(
        [fresh / "bin" / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert str(site) in done.stdout
    shown = subprocess.run(
        [fresh / "bin" / "mpq", "demo", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(shown.stdout)["digits"] == 797


def site_packages() -> Path:
    import numpy

    return Path(numpy.__file__).parent.parent


def wheel_modules(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        files = [Path(name) for name in archive.namelist() if name.endswith(".py")]
    return [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]


def imports(file: Path) -> Iterator[str]:
    """The parts of this package that a file imports, wherever in the file."""
    package = ("mpq_plugins", *file.relative_to(ROOT / "mpq_plugins").parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module or "").split(".")) if node.module else base
            names = [target] if node.module else [(*base, alias.name) for alias in node.names]
            yield from (name[1] for name in names if len(name) > 1)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mpq_plugins."):
            yield (node.module or "").split(".")[1]


@pytest.mark.parametrize("file", sorted((ROOT / "mpq_plugins").rglob("*.py")), ids=lambda file: file.stem)
def test_data_flows_one_way(file: Path) -> None:
    part = file.relative_to(ROOT / "mpq_plugins").parts[0].removesuffix(".py")
    if part == "__init__":
        return  # the public surface names every part
    order = {name: position for position, layer in enumerate(FLOW) for name in layer}
    assert part in order, f"{part} has no place in the flow yet; give it one"
    assert [name for name in imports(file) if order[name] > order[part]] == []


def test_allocators_know_no_torch() -> None:
    code = (
        "import sys, mpq_plugins.allocation.budget, mpq_plugins.allocation.mixquant, mpq_plugins.allocation.ptilmpq, "
        "mpq_plugins.allocation.sqnr, mpq_plugins.allocation.uniform; "
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_public_surface_is_sorted_and_complete() -> None:
    # As the linter sorts: all capitals, then the rest.
    assert mpq_plugins.__all__ == sorted(mpq_plugins.__all__, key=lambda name: (not name.isupper(), name))
    for name in mpq_plugins.__all__:
        assert getattr(mpq_plugins, name).__module__.startswith("mpq_plugins")
    with pytest.raises(AttributeError, match="no attribute 'meassure'"):
        mpq_plugins.meassure  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    "first", ["mpq_plugins.measurement.measure", "mpq_plugins.simulation.apply", "mpq_plugins.cli.main"]
)
def test_functions_that_share_a_packages_name_stay_functions(first: str) -> None:
    code = (
        f"import {first}, types, mpq_plugins as m; print({{type(m.measure), type(m.apply)}} == {{types.FunctionType}})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


@pytest.mark.parametrize(
    "command", [["--help"], ["plan", "--help"], ["sweep", "-a", "ptilmpq", "--help"], ["plugins"], ["--version"]]
)
def test_answers_that_need_no_torch_do_not_import_it(command: list[str]) -> None:
    code = (
        "import sys; from mpq_plugins.cli.main import main; sys.argv = ['mpq', *{command}]\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules and 'numba' not in sys.modules"
    ).replace("{command}", repr(command))
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
