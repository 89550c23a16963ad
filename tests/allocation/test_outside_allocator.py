"""An allocator of another distribution: found by its entry point, planned with, and named where it is broken."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_model

from mpq_plugins import Allocator, Plan, measure
from mpq_plugins.common import registry
from mpq_plugins.errors import PluginError
from tests.conftest import Ran
from tests.helpers import outsider
from tests.helpers.distributions import install
from tests.helpers.nets import conv_net

Mpq = Callable[..., Ran]
WORKING = inspect.getsource(outsider)
# What its module holds -> what is said of it; `best` is the class that the entry point names.
BROKEN = {
    "no-needs": ("class Best:\n    name = 'best'\n    def __call__(self, table): ...", "lacks needs"),
    "no-call": ("class Best:\n    name = 'best'\n    needs = None", "lacks __call__"),
    "nothing": ("class Best: ...", "lacks name, needs, __call__"),
    "no-class": ("Other = 1", "cannot be imported from"),
    "fails": ("raise ValueError('no licence')", "ValueError: no licence"),
}
HEAD = "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Best:\n    name = 'best'\n"
FAIL = "raise ValueError('no licence')"
AT_WORK = {
    "making": f"{HEAD}    needs = None\n    def __post_init__(self): {FAIL}\n    def __call__(self, table): ...",
    "needs": f"{HEAD}    @property\n    def needs(self): {FAIL}\n    def __call__(self, table): ...",
    "call": f"from mpq_plugins import Needs\n{HEAD}    needs = Needs((4,))\n    def __call__(self, table): {FAIL}",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path for distributions of others."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save_model(conv_net(), str(path))
    return path


def test_it_uses_public_names_alone() -> None:
    imported = [line for line in WORKING.splitlines() if "import" in line and "mpq_plugins" in line]
    assert imported == ["from mpq_plugins import LayerTable, Needs, Plan, make_plan"]
    known: Allocator = outsider.FirstLast(edge=8)
    assert known.name == "firstlast"


def test_it_plans_as_ours_do(mpq: Mpq, site: Path, checkpoint: Path, tmp_path: Path) -> None:
    install(site, "working-allocator", WORKING, {"allocators": {"firstlast": "FirstLast"}})
    ran = mpq("plan", checkpoint, "-a", "firstlast", "--edge", "8", "--inner-bits", "3", "-o", tmp_path / "plan.json")
    assert ran.code == 0, ran.err
    plan = Plan.load(tmp_path / "plan.json")
    table = measure(checkpoint, bits=(3, 4, 8))
    assert plan.to_json() == outsider.FirstLast(edge=8, inner_bits=3)(table).to_json()
    assert plan.allocator.name == "firstlast"
    assert " bits at both ends; required" in " ".join(mpq("plan", "-a", "firstlast", "--help").out.split())
    assert ("firstlast", "working-allocator") in [
        (plugin["name"], plugin["distribution"]) for plugin in json.loads(mpq("plugins", "--json").out)
    ]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_is_named_and_others_go_on(mpq: Mpq, site: Path, checkpoint: Path, name: str) -> None:
    code, said = BROKEN[name]
    install(site, f"broken-{name}", code, {"allocators": {"best": "Best"}})
    ran = mpq("plan", checkpoint, "-a", "best")
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert all(fact in ran.err for fact in ("allocators: 'best'", f"broken-{name}", said)), ran.err
    with pytest.raises(PluginError):
        registry.load("allocators", "best")
    assert f"broken-{name}" in mpq("plugins").out
    assert mpq("plan", checkpoint, "-a", "uniform", "--bits", "4").code == 0


@pytest.mark.parametrize("when", AT_WORK)
def test_one_that_fails_at_work_is_named_with_its_distribution(
    mpq: Mpq, site: Path, checkpoint: Path, when: str
) -> None:
    install(site, f"failing-{when}", AT_WORK[when], {"allocators": {"best": "Best"}})
    ran = mpq("plan", checkpoint, "-a", "best")
    assert (ran.code, ran.out) == (2, "")
    assert f"allocators: 'best' of failing-{when} failed (ValueError: no licence)" in ran.err


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_hides_no_misspelled_option_of_another(mpq: Mpq, site: Path, checkpoint: Path, name: str) -> None:
    install(site, f"hiding-{name}", BROKEN[name][0], {"allocators": {"best": "Best"}})
    for option, said in (("--qemm", "No such option"), ("--average-bits", "it belongs to budget")):
        ran = mpq("plan", checkpoint, "-a", "mixquant", option, "3")
        assert ran.code == 2
        assert option in ran.err
        assert said in ran.err
        assert "best" not in ran.err


GROUPS = ("allocators", "adapters", "exporters", "configs", "sensitivities", "schemes")


@pytest.mark.parametrize("group", GROUPS)
def test_a_name_with_two_owners_is_listed_with_both_and_in_nobody_elses_way(
    mpq: Mpq, site: Path, checkpoint: Path, group: str
) -> None:
    for distribution in ("twice-one", "twice-two"):
        install(site, distribution, "class Twice: ...", {group: {"twice": "Twice"}})
    listed = json.loads(mpq("plugins", "--json").out)
    assert [p["distribution"] for p in listed if p["name"] == "twice"] == ["twice-one", "twice-two"]
    assert mpq("plugins").code == 0
    for command in ("measure", "plan", "sweep", "tune", "check", "pareto"):
        ran = mpq(command, "--help")
        assert ran.code == 0, ran.err
    assert mpq("plan", checkpoint, "-a", "uniform").code == 0
    assert "No such option" in mpq("plan", checkpoint, "--misspelled", "3").err
