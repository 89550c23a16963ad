"""What is public says what it takes, gives and refuses, in Google's form, with an example that runs."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

import mpq_plugins
from mpq_plugins.common.extras import missing_for
from mpq_plugins.errors import MPQError, SettingError

ROOT = Path(__file__).parents[1]
EXPORTERS = ("compressed_tensors", "gptq", "mlx")
ADAPTERS = ("fx", "torchao", "pt2e", "brevitas", "inc", "inc_classic", *EXPORTERS)
OF_BACKENDS = (
    ":DeprecationWarning", ":FutureWarning", ":UserWarning:torch.ao.quantization",
    "torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning",
)  # fmt: skip
CONTRACT = ("check", "apply", "verify")  # what every adapter shows at work; the rest is in docs/backends, whole
OF_EXPORTERS = ("check", "export", "verify")
SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Examples):$")
ENTRY = re.compile(r"    \*{0,2}(\w+): \S")
ERRORS = {name for name, value in vars(importlib.import_module("mpq_plugins.errors")).items() if inspect.isclass(value)}

RECORDS = {
    "Allocation", "BlockReport", "Change", "Comparison", "Curves", "Difference", "EvaluatedPlan", "LabelledPlan",
    "LayerCheck", "LayerSize", "LayerStats", "Needs", "PartCheck", "PartCodes", "Storage", "SweepRow",
}  # fmt: skip
"""What functions give back, or adapters declare: shown where it comes from."""

WITHOUT_EXAMPLE = RECORDS | {
    "InputRange",  # shown by input_ranges and its kin
    "Job",  # made by `sensitivity`, and handed to what a plugin says
    "RowQuantizer",  # a base class: docs/extending.md has a whole scheme
}


def for_adapters(test: Callable[..., None]) -> Callable[..., None]:
    """A test of each adapter. What backends warn of as they are imported and run is not what is tried."""
    quiet = [pytest.mark.filterwarnings(f"ignore:{warning}") for warning in OF_BACKENDS]
    for mark in (*quiet, pytest.mark.parametrize("name", ADAPTERS), pytest.mark.slow):
        test = mark(test)
    return test


def adapter(name: str) -> Any:
    reason = missing_for(name)
    if reason:
        pytest.skip(reason)
    return importlib.import_module(f"mpq_plugins.adapters.{name}")


def described(module: Any) -> dict[str, Any]:
    """The functions and classes that a module hands on, by name."""
    values = {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in values.items() if inspect.isclass(value) or inspect.isroutine(value)}


def sections(doc: str) -> dict[str, list[str]]:
    """Section -> the names of its entries, in their order."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in doc.splitlines():
        if header := SECTION.match(line):
            current = found.setdefault(header[1], [])
        elif entry := ENTRY.match(line):
            current.append(entry[1])
    return found


def own_functions(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods that a class defines itself; `__call__` is what allocators are called by."""
    for name, member in vars(cls).items():
        plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if inspect.isfunction(plain) and (name == "__call__" or not name.startswith("_")):
            yield name, plain


def own_properties(cls: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(cls).items():
        if isinstance(member, property | cached_property) and not name.startswith("_"):
            yield name, member


def fields_of(cls: type) -> list[str]:
    if issubclass(cls, BaseModel):
        return list(cls.model_fields)
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def parameters_of(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def raised(function: Any) -> set[str]:
    """The errors of ours that a function raises itself, as its source says."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    raises = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    called = [exc.func for exc in raises if isinstance(exc, ast.Call)]
    return {name.id for name in called if isinstance(name, ast.Name)} & ERRORS


def text_problems(where: str, doc: str | None) -> list[str]:
    if not doc:
        return [f"{where}: has no docstring"]
    first = doc.splitlines()[0]
    problems = [] if first.endswith(".") and first[0] != " " else [f"{where}: its first line is no sentence: {first}"]
    if ">>>" in doc and "Examples" not in sections(doc):
        problems.append(f"{where}: what it shows is not under Examples:, which the manual renders")
    return problems


def function_problems(where: str, function: Any) -> list[str]:
    doc = inspect.getdoc(function)
    problems = text_problems(where, doc)
    said = sections(doc or "")
    if said.get("Args", []) != parameters_of(function):
        problems.append(f"{where}: Args says {said.get('Args')}, and it takes {parameters_of(function)}")
    gives = inspect.signature(function).return_annotation not in (None, "None")
    if gives != bool({"Returns", "Yields"} & said.keys()):
        problems.append(f"{where}: Returns is {'missing' if gives else 'there, and it returns nothing'}")
    if silent := raised(function) - {*said.get("Raises", [])}:
        problems.append(f"{where}: Raises lacks {sorted(silent)}")
    if unknown := {*said.get("Raises", [])} - ERRORS:
        problems.append(f"{where}: Raises names what is none of ours: {sorted(unknown)}")
    return problems


def class_problems(where: str, cls: type) -> list[str]:
    said = sections(inspect.getdoc(cls) or "")
    problems = text_problems(where, inspect.cleandoc(vars(cls).get("__doc__") or ""))  # its own, not a base's
    fields = fields_of(cls)
    told = [name for name in said.get("Attributes", []) if name in fields]
    if told != fields:
        problems.append(f"{where}: Attributes says {told}, and it has {fields}")
    if not fields and inspect.isfunction(vars(cls).get("__init__")) and not issubclass(cls, MPQError):
        if is_protocol(cls):
            return problems
        taken = parameters_of(vars(cls)["__init__"])
        if said.get("Args", []) != taken:
            problems.append(f"{where}: Args says {said.get('Args')}, and it takes {taken}")
    for name, function in own_functions(cls):
        problems += function_problems(f"{where}.{name}", function)
    for name, member in own_properties(cls):
        problems += text_problems(f"{where}.{name}", member.__doc__)
    return problems


def problems(where: str, value: Any) -> list[str]:
    return class_problems(where, value) if inspect.isclass(value) else function_problems(where, value)


def is_protocol(value: Any) -> bool:
    return bool(getattr(value, "_is_protocol", False))


def needs_example(name: str, value: Any) -> bool:
    """Errors and warnings say what they are of, and a contract is shown by those who keep it."""
    quiet = inspect.isclass(value) and (issubclass(value, Exception) or is_protocol(value))
    return not quiet and name not in WITHOUT_EXAMPLE


def examples(name: str, value: Any) -> list[doctest.DocTest]:
    # module=False: classes call themselves mpq_plugins.NAME, and doctest would take their methods for another's.
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(value, name, module=False, globs={}) if test.examples]


def run_examples(values: Mapping[str, Any]) -> int:
    """How many were run. Fails with what doctest has to say."""
    said: list[str] = []
    runner = doctest.DocTestRunner()
    for name, value in values.items():
        for test in examples(name, value):
            runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
    return runner.tries


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder for what examples write, one thread, and a seed."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", mpq_plugins.__all__)
def test_public_names_say_what_they_take_give_and_refuse(name: str) -> None:
    value = getattr(mpq_plugins, name)
    assert problems(name, value) == []
    if needs_example(name, value):
        assert examples(name, value), f"{name}: has no example"


def test_those_without_an_example_have_none() -> None:
    public = described(mpq_plugins)
    assert public.keys() >= WITHOUT_EXAMPLE
    assert [name for name in WITHOUT_EXAMPLE if ">>>" in public[name].__doc__] == []


@for_adapters
def test_adapters_say_what_they_take_give_and_refuse(name: str) -> None:
    values = described(adapter(name))
    assert [problem for each, value in values.items() for problem in problems(f"{name}.{each}", value)] == []


@cache
def not_imperative() -> Mapping[Path, set[int]]:
    """File -> the lines of docstrings that begin otherwise than with an order, as ruff finds them."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--exit-zero", "--output-format", "json"]
    done = subprocess.run(
        [*command, "--select", "D401", "mpq_plugins", "adapters"], capture_output=True, check=True, cwd=ROOT
    )
    found: dict[Path, set[int]] = {}
    for one in json.loads(done.stdout):
        found.setdefault(Path(one["filename"]).resolve(), set()).add(one["location"]["row"])
    return found


def docstring_line(function: Any) -> tuple[Path, int]:
    plain = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(plain)
    [definition] = ast.parse(textwrap.dedent("".join(lines))).body
    assert isinstance(definition, ast.FunctionDef)
    return Path(inspect.getfile(plain)).resolve(), first + definition.body[0].lineno - 1


def not_orders(values: Mapping[str, Any]) -> list[str]:
    functions = [(name, value) for name, value in values.items() if not inspect.isclass(value)]
    for name, value in values.items():
        if inspect.isclass(value):
            functions += [(f"{name}.{method}", function) for method, function in own_functions(value)]
    places = {name: docstring_line(function) for name, function in functions}
    return [name for name, (file, line) in places.items() if line in not_imperative().get(file, set())]


def test_functions_begin_with_an_order() -> None:
    assert not_imperative(), "ruff finds private ones that are described, which is as it should be"
    assert not_orders(described(mpq_plugins)) == []


@for_adapters
def test_functions_of_adapters_begin_with_an_order(name: str) -> None:
    assert not_orders(described(adapter(name))) == []


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", [each for each, value in described(mpq_plugins).items() if examples(each, value)])
def test_examples_give_what_they_say(name: str) -> None:
    assert run_examples({name: getattr(mpq_plugins, name)}) > 1


@for_adapters
@pytest.mark.usefixtures("alone")
def test_examples_of_adapters_give_what_they_say(name: str) -> None:
    values = described(adapter(name))
    contract = OF_EXPORTERS if name in EXPORTERS else CONTRACT
    assert [each for each in contract if not examples(each, values[each])] == []
    assert run_examples(values) > 1


def test_what_is_missing_is_found() -> None:
    def tells_little(x: int, y: int) -> int:
        """Returns x

        Args:
            x: One.
        """
        if x > y:
            raise SettingError("x: is above y")
        return x

    assert function_problems("it", tells_little) == [
        "it: its first line is no sentence: Returns x",
        "it: Args says ['x'], and it takes ['x', 'y']",
        "it: Returns is missing",
        "it: Raises lacks ['SettingError']",
    ]
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        run_examples({"wrong": type("Wrong", (), {"__doc__": ">>> 1 + 1\n3\n"})})
