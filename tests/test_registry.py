import subprocess
import sys
from types import SimpleNamespace

import pytest

from mpq_plugins import MixQuant, registry
from mpq_plugins.errors import PluginError


def test_ours_are_found_like_anyone_elses() -> None:
    found = {(plugin.group, plugin.name): plugin for plugin in registry.installed()}
    assert found["allocators", "mixquant"].distribution == "mpq-plugins"
    assert registry.load("allocators", "mixquant") is MixQuant


def test_listing_imports_nothing() -> None:
    code = (
        "import sys; from mpq_plugins import registry; registry.installed();"
        "print([m for m in sys.modules if m == 'torch' or m.startswith('mpq_plugins.allocate')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def declare(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str, str]) -> None:
    def found(group: str) -> list[SimpleNamespace]:
        wanted = [entry for entry in entries if group == "mpq_plugins.allocators"]
        return [SimpleNamespace(name=n, value=v, dist=SimpleNamespace(name=d)) for n, v, d in wanted]

    monkeypatch.setattr(registry, "entry_points", found)


def test_two_owners_of_one_name_are_an_error_naming_both(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, ("best", "one:A", "first-dist"), ("best", "two:B", "second-dist"))
    with pytest.raises(PluginError, match=r"'best' is declared by both first-dist \(one:A\) and second-dist \(two:B\)"):
        registry.installed()


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(
        PluginError, match="'mixqant' is not installed; there are budget, mixquant, ptilmpq, sqnr, uniform"
    ):
        registry.load("allocators", "mixqant")


def test_a_broken_plugin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, ("best", "no_such_module:A", "some-dist"))
    with pytest.raises(PluginError, match=r"'best' of some-dist cannot be imported from no_such_module:A"):
        registry.load("allocators", "best")
