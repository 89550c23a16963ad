"""The shape of the project: packages, the wheel, the direction of imports, the public surface."""

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
import typing
import venv
import warnings
import zipfile
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

import mpq_plugins

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# As data flows: a package imports itself and those before it, wherever in a file the import stands.
ORDER = (
    "errors",
    "common",
    "plans",
    "models",
    "checkpoints",
    "weights",
    "quantization",
    "measurement",
    "allocation",
    "importing",
    "simulation",
    "reconstruction",
    "compression",
    "evaluation",
    "adapters",
    "report",
    "cli",
    "__main__",
)
ADAPTERS = (
    "brevitas", "compressed_tensors", "configs", "fx", "gguf", "gptq", "inc", "inc_classic", "mlx", "pt2e", "torchao",
)  # fmt: skip


ELSEWHERE = {
    "nncodec": "one test compares with it, and it brings much: pip install nncodec",
    "mpq_plugins.adapters.inc_classic": "its backend has an environment of its own, which `make classic` runs",
    "neural_compressor.strategy": "as inc_classic",
}
"""What the tools do not bring, and why."""


def packages_in_the_tree() -> set[str]:
    found = {
        ".".join(("mpq_plugins", *i.parent.relative_to(ROOT).parts)) for i in (ROOT / "adapters").rglob("__init__.py")
    }
    for init in (ROOT / "mpq_plugins").rglob("__init__.py"):
        found.add(".".join(init.parent.relative_to(ROOT).parts))
    return found


CODE = sorted((ROOT / "mpq_plugins").rglob("*.py")) + sorted((ROOT / "adapters").rglob("*.py"))
CITED = re.compile(r"(?<![\w./])(?:[a-z_0-9]+/)*[a-z_0-9]+\.py\b")
EXAMPLES = {"file.py", "mine.py"}  # of a user's


@pytest.mark.parametrize("file", CODE, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_that_are_cited_are_there(file: Path) -> None:
    places = (file.parent, ROOT / "mpq_plugins", ROOT)
    names = {path.name for path in CODE}
    for cited in sorted({*CITED.findall(file.read_text())} - EXAMPLES):
        assert cited in names or any((place / cited).is_file() for place in places), cited


def test_every_package_is_listed() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_in_the_tree()


def test_the_top_level_is_what_was_agreed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    allowed = {"pyproject.toml", "README.md", "mpq_plugins", "adapters", "tests", "examples"}
    beside = {"Makefile", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", "docs"}
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


@pytest.mark.slow
def asked_for() -> dict[str, Path]:
    """Modules that tests are skipped without, each with a file that asks for it."""
    pattern = re.compile(r'importorskip\(\s*"([\w.]+)"')
    return {name: file for file in sorted(ROOT.glob("tests/**/*.py")) for name in pattern.findall(file.read_text())}


@pytest.mark.parametrize("name", sorted(asked_for().keys() - ELSEWHERE.keys()))
def test_what_tests_are_skipped_without_comes_with_the_tools(name: str) -> None:
    """A test that is skipped wherever it is run shows nothing; `dev` brings what it asks for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that are imported on the way
        found = find_spec(name)
    assert found is not None, f"{asked_for()[name]} is skipped without {name}"


def test_the_wheel_holds_everything_and_imports_under_its_own_name(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, for building leaves a folder behind that the next build would pick up
    for name in ("mpq_plugins", "adapters"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assets = (path for path in (ROOT / "mpq_plugins/report/page/assets").rglob("*") if path.is_file())
    assert {str(path.relative_to(ROOT)) for path in assets} <= packed
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


def modules() -> dict[str, Path]:
    """Every module of the package by its name, those of adapters among them."""
    files = [file for file in (ROOT / "mpq_plugins").rglob("*.py") if file.is_relative_to(ROOT / "mpq_plugins")]
    files = [file for file in files if "adapters" not in file.relative_to(ROOT).parts[:2]]
    named = [(file.relative_to(ROOT), file) for file in files]
    named += [("mpq_plugins" / file.relative_to(ROOT), file) for file in (ROOT / "adapters").rglob("*.py")]
    return {".".join(name.with_suffix("").parts).removesuffix(".__init__"): file for name, file in named}


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of this package that one imports: at its top, in a function, or for the type checker alone."""
    file = MODULES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    targets: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys()
            targets |= inner or {module}
    return {target for target in targets if target in MODULES} - {name}


IMPORTS = {name: imports(name) for name in MODULES}


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if name != "mpq_plugins"])
def test_data_flows_one_way(name: str) -> None:
    place = ORDER.index(name.split(".")[1])
    assert [target for target in IMPORTS[name] if target == "mpq_plugins"] == [], "the public names are for users"
    assert [target for target in IMPORTS[name] if ORDER.index(target.split(".")[1]) > place] == []


def test_no_imports_go_in_a_circle() -> None:
    order = TopologicalSorter(IMPORTS)
    try:
        order.prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_knows_no_other(adapter: str) -> None:
    home = f"mpq_plugins.adapters.{adapter}"
    known = {target for name in MODULES if f"{name}.".startswith(f"{home}.") for target in IMPORTS[name]}
    others = [
        target for target in known if any(f"{target}.".startswith(f"mpq_plugins.adapters.{a}.") for a in ADAPTERS)
    ]
    assert [target for target in others if not f"{target}.".startswith(f"{home}.")] == []


def test_no_module_has_the_name_of_a_function_its_package_hands_on() -> None:
    faces = {name: file for name, file in MODULES.items() if file.name == "__init__.py"}
    for name, file in faces.items():
        handed = {
            alias.asname or alias.name
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert {own for own in handed if f"{name}.{own}" in MODULES} == set(), name


WITHOUT_TORCH = """
import sys
import numpy as np
from mpq_plugins import MixQuant, PTILMPQ, SQNR, Affine, Budget, LayerStats, LayerTable, LatencyTable, Plan, Uniform
from mpq_plugins import compare

bits = tuple(range(1, 9))
errors = np.array([4.0**-b for b in bits])
layers = tuple(
    LayerStats(name, "linear", (4, 8), 0, 1.0, np.ones(4), {m: errors for m in ("relative", "mse")},
               {m: np.tile(errors[:, None], 4) for m in ("relative", "mse")})
    for name in ("a", "b", "c")
)
table = LayerTable(layers, Affine(granularity="per_channel"), bits, ("relative", "mse"), False, "0" * 16)
costs = LatencyTable({layer.name: {b: float(b) for b in bits} for layer in layers})
table.save(sys.argv[1] + "/table.mpqt")
table = LayerTable.load(sys.argv[1] + "/table.mpqt")
for allocator in (
    MixQuant(), PTILMPQ(), SQNR(), Uniform(bits=4), Budget(average_bits=3), Budget(size_bytes=80),
    Budget(latency=costs, latency_limit=20.0, average_bits=6, ends=8),
):
    plan = allocator(table)
    plan.save(sys.argv[1] + "/plan.json")
    assert Plan.load(sys.argv[1] + "/plan.json") == plan
    plan.size(), compare(table, plan), plan.diff(plan)
print("torch" in sys.modules, "numba" in sys.modules)
"""


def test_plans_and_allocators_know_no_torch_even_at_work(tmp_path: Path) -> None:
    run = [sys.executable, "-W", "ignore", "-c", WITHOUT_TORCH, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_the_public_surface_is_sorted_and_complete() -> None:
    assert mpq_plugins.__all__ == sorted(mpq_plugins.__all__)
    for name in mpq_plugins.__all__:
        value = getattr(mpq_plugins, name)
        assert value.__module__ == "mpq_plugins" or (not isinstance(value, type) and value.__module__ in MODULES), name
    with pytest.raises(AttributeError, match="No mpq_plugins attribute meassure"):
        mpq_plugins.meassure  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", mpq_plugins.__all__)
def test_types_of_the_public_surface_can_be_resolved(name: str) -> None:
    value = getattr(mpq_plugins, name)
    if isinstance(value, type) or inspect.isfunction(value):
        assert isinstance(typing.get_type_hints(value), dict)
    for method in vars(value).values() if isinstance(value, type) else ():
        if inspect.isfunction(method):
            assert isinstance(typing.get_type_hints(method), dict)


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
