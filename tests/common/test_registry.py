import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpq_plugins import MixQuant
from mpq_plugins.common import registry
from mpq_plugins.errors import PluginError
from tests.helpers.says import naming


def test_ours_are_found_like_anyone_elses() -> None:
    found = {(plugin.group, plugin.name): plugin for plugin in registry.installed()}
    assert found["allocators", "mixquant"].distribution == "mpq-plugins"
    assert registry.load("allocators", "mixquant") is MixQuant


def test_listing_imports_nothing() -> None:
    code = (
        "import sys; from mpq_plugins.common import registry; registry.installed();"
        "print([m for m in sys.modules if m == 'torch' or m.startswith('mpq_plugins.allocation')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def declare(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str, str]) -> None:
    def found(group: str) -> list[SimpleNamespace]:
        wanted = [entry for entry in entries if group == "mpq_plugins.allocators"]
        return [SimpleNamespace(name=n, value=v, dist=SimpleNamespace(name=d)) for n, v, d in wanted]

    monkeypatch.setattr(registry, "entry_points", found)


BAD_MODULES = {
    "leaves": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "raises": ("raise ValueError('why')", "ValueError: why"),
    "strange": ("class Strange(BaseException): pass\nraise Strange('odd')", "Strange: odd"),
    "silent": ("class Silent(BaseException):\n  def __str__(self): raise ValueError\nraise Silent", "Silent"),
    "deep": ("def f(): f()\nf()", "RecursionError"),
    "empty": ("", "AttributeError: module"),
    "damaged": ("def", "SyntaxError"),
}


@pytest.mark.parametrize("name", list(BAD_MODULES))
def test_whatever_a_plugin_does_on_import_is_its_own_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    code, said = BAD_MODULES[name]
    (tmp_path / f"plugin_{name}.py").write_text(f"print('on stdout')\n{code}\n" if name != "damaged" else code)
    monkeypatch.syspath_prepend(tmp_path)
    declare(monkeypatch, ("best", f"plugin_{name}:A", "some-dist"))
    with pytest.raises(PluginError, match=naming("'best'", "some-dist", f"plugin_{name}:A", said)):
        registry.load("allocators", "best")
    assert capsys.readouterr().out == ""  # which is for results


def test_an_interrupt_while_a_plugin_is_imported_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "plugin_stopped.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(tmp_path)
    declare(monkeypatch, ("best", "plugin_stopped:A", "some-dist"))
    with pytest.raises(KeyboardInterrupt):
        registry.load("allocators", "best")


def test_two_owners_of_one_name_are_an_error_naming_both(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, ("best", "one:A", "first-dist"), ("best", "two:B", "second-dist"))
    with pytest.raises(PluginError, match=naming("'best'", "first-dist", "one:A", "second-dist", "two:B")):
        registry.load("allocators", "best")
    assert [plugin.distribution for plugin in registry.installed()] == ["first-dist", "second-dist"]
    assert registry.names("allocators") == ("best",)


def test_what_two_folders_say_of_one_distribution_is_one_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, *[("mixquant", "mpq_plugins.allocation.mixquant:MixQuant", "some-dist")] * 2)
    assert registry.load("allocators", "mixquant") is MixQuant
    assert len(registry.installed()) == 1


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(PluginError, match=naming("'mixqant'", "budget", "mixquant", "ptilmpq", "sqnr", "uniform")):
        registry.load("allocators", "mixqant")


def test_a_broken_plugin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, ("best", "no_such_module:A", "some-dist"))
    with pytest.raises(PluginError, match=naming("'best'", "some-dist", "no_such_module:A")):
        registry.load("allocators", "best")
