"""Functions named on the command line: dotted, or in a file wherever it lies."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpq_plugins.cli.functions import function_file, named_function, names_function
from mpq_plugins.errors import SourceError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside_it.py").write_text("VALUE = 'beside'\n")
    (tmp_path / "own_net.py").write_text("import beside_it\ndef make(): return beside_it.VALUE\nNUMBER = 3\n")
    (tmp_path / "deep" / "pack").mkdir(parents=True)
    (tmp_path / "deep" / "pack" / "__init__.py").touch()
    (tmp_path / "deep" / "pack" / "other.py").write_text("VALUE = 'relative'\n")
    (tmp_path / "deep" / "pack" / "in_package.py").write_text("from .other import VALUE\ndef make(): return VALUE\n")
    (tmp_path / "json.py").write_text("def make(): return 'mine'\n")
    (tmp_path / "my-net.py").write_text("def make(): return 1\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("own_net:make", "beside"),
        ("own_net.py:make", "beside"),
        ("./own_net.py:make", "beside"),
        ("deep/pack/in_package.py:make", "relative"),
    ],
)
def test_a_function_is_found_in_its_file_or_by_its_module(text: str, value: str) -> None:
    before = list(sys.path)
    assert named_function(text)() == value
    assert sys.path == before


def test_a_file_elsewhere_is_found_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert named_function(f"{folder}/own_net.py:make")() == "beside"


def test_both_spellings_are_one_module() -> None:
    named_function("own_net.py:make")
    first = sys.modules["own_net"]
    named_function("own_net:make")
    assert sys.modules["own_net"] is first


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("none.py:make", "there is no file none.py"),
        ("own_net.py:nothing", "has no 'nothing'"),
        ("own_net.py:NUMBER", "is a int; a function is needed"),
        ("json.py:make", "Python finds another module 'json'"),
        ("my-net.py:make", "my-net.py is no name that Python imports"),
        ("own_net.py", "names no function; write package.module:function"),
        ("own net:make", "names no function"),
    ],
)
def test_what_cannot_be_found_is_said(text: str, said: str) -> None:
    with pytest.raises(SourceError) as caught:
        named_function(text)
    assert said in str(caught.value)


def test_a_file_that_is_there_is_no_function(folder: Path) -> None:
    assert names_function("own_net.py:make")
    (folder / "own_net.py:make").touch()
    assert not names_function("own_net.py:make")


@pytest.mark.parametrize(
    ("text", "file"), [("a.b:make", "a/b.py"), ("a/b.py:make", "a/b.py"), ("a/b.pt", None), ("x", None)]
)
def test_the_file_of_a_function_is_protected(text: str, file: str | None) -> None:
    assert function_file(text) == (None if file is None else Path(file))


def test_a_name_that_is_nearly_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "near_mine.py").write_text("def network():\n    return None\n")
    with pytest.raises(
        SourceError,
        match=r"near_mine.py:netwrk: the function cannot be found: near_mine has no 'netwrk'. Did you mean network\?",
    ):
        named_function("near_mine.py:netwrk")
    with pytest.raises(SourceError, match=r"near_mine has no 'z'$"):
        named_function("near_mine.py:z")
