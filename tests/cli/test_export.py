"""`mpq export`, with an exporter and a writer of configurations of another package's."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpq_plugins import Affine, Uniform, measure
from tests.conftest import Ran
from tests.helpers.distributions import install

Mpq = Callable[..., Ran]

CODE = """
from pathlib import Path
from mpq_plugins import Capabilities, Exported, SettingError, VerifyError

CAPABILITIES = Capabilities(backend="plain", bits=(4, 8), kinds=("linear",))
RUNTIMES = {"one": CAPABILITIES, "two": Capabilities(backend="plain", bits=(2, 4), kinds=("linear",))}

def check(plan, source, runtime="one"):
    if any(layer.bits not in RUNTIMES[runtime].bits for layer in plan.layers):
        raise SettingError("plain: only 4 and 8, in my own words")

def export(source, plan, output, *, runtime="one", progress=None):
    check(plan, source, runtime)
    progress("fc", 0, 32)
    output.mkdir()
    (output / "bits").write_text(runtime + " " + str(plan.layers[0].bits))
    return Exported(output, 1, 2048, 4096, ("mind the gap",))

def verify(exported, plan, source, *, progress=None):
    if (source / "broken").exists():
        raise VerifyError("does not hold the plan")

def config(plan, source):
    return "".join(f"{layer.name}={layer.bits}\\n" for layer in plan.layers)
"""


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    install(folder, "mpq-plain", CODE, {"exporters": {"plain": ""}, "configs": {"plain": "", "widths": ""}})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    save_file({"fc.weight": torch.randn(4, 8), "last.weight": torch.randn(2, 4)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture
def plan_file(source: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    Uniform(bits=2)(measure(source, Affine(granularity="per_channel"), (2,))).save(path)
    return path


def test_the_target_is_asked_what_it_holds_and_refuses_in_its_own_words(
    mpq: Mpq, plan_file: Path, source: Path, tmp_path: Path
) -> None:
    ran = mpq("export", plan_file, source, "--to", "plain", "-o", tmp_path / "out")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[-1] == "mpq: error: plain: only 4 and 8, in my own words"
    assert not (tmp_path / "out").exists()


def test_a_policy_changes_the_plan_and_says_what(mpq: Mpq, plan_file: Path, source: Path, tmp_path: Path) -> None:
    ran = mpq("export", plan_file, source, "--to", "plain", "--policy", "up", "-o", tmp_path / "out")
    assert ran.code == 0
    assert (tmp_path / "out" / "bits").read_text() == "one 4"
    assert "fc: 2 bits, asymmetric per_channel minmax becomes 4 bits" in ran.err
    assert "note: mind the gap" in ran.err
    assert "1 layers for plain, 2.05 kB of 4.10 kB in total, read back and as planned" in ran.out


def test_a_runtime_takes_what_the_default_does_not(mpq: Mpq, plan_file: Path, source: Path, tmp_path: Path) -> None:
    arguments = ("export", plan_file, source, "--to", "plain", "-o", tmp_path / "out", "--json", "--runtime")
    ran = mpq(*arguments, "three")
    assert (ran.code, ran.err.splitlines()[-1]) == (2, "mpq: error: runtime: 'three' is not allowed; one, two")
    ran = mpq(*arguments, "two")
    assert ran.code == 0
    document = json.loads(ran.out)
    assert document["path"] == str(tmp_path / "out")
    assert document["layers"], document["changes"] == (1, [])
    assert document["notes"] == ["mind the gap"]


def test_what_was_not_written_as_planned_is_an_error(mpq: Mpq, plan_file: Path, source: Path, tmp_path: Path) -> None:
    (source / "broken").touch()
    ran = mpq("export", plan_file, source, "--to", "plain", "--policy", "up", "-o", tmp_path / "out")
    assert (ran.code, ran.err.splitlines()[-1]) == (2, "mpq: error: does not hold the plan")


def test_a_configuration_is_one_file(mpq: Mpq, plan_file: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "widths.txt"
    ran = mpq("export", plan_file, source, "--to", "widths", "--config-only", "-o", output)
    assert ran.code == 0
    assert output.read_text() == "fc=2\nlast=2\n"
    assert "2 layers for widths" in ran.out
    ran = mpq("export", plan_file, source, "--to", "widths", "--config-only", "-o", output)
    assert (ran.code, "--force" in ran.err) == (2, True)
    ran = mpq("export", plan_file, source, "--to", "plain", "--config-only", "-o", output, "--force", "--json")
    assert json.loads(ran.out) == {"path": str(output), "to": "plain", "changes": []}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "widths"], "to: 'widths' writes a configuration alone: add --config-only"),
        (["--to", "compressed_tensors", "--config-only"], "writes weights: leave --config-only out"),
        (["--to", "plane"], "to: 'plane' is not installed; there are "),
        (["--to", "plain", "--policy", "down"], "policy: 'down' is not allowed; up, nearest, error"),
        ([], "Missing option '--to'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(
    mpq: Mpq, plan_file: Path, source: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    ran = mpq("export", plan_file, source, "-o", tmp_path / "out", *words)
    assert ran.code == 2
    assert said in ran.err
    assert len(ran.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_arguments_the_other_way_round_are_told(mpq: Mpq, plan_file: Path, source: Path, tmp_path: Path) -> None:
    ran = mpq("export", source, plan_file, "--to", "plain", "-o", tmp_path / "out")
    assert ran.code == 2
    assert "mpq export PLAN SOURCE" in ran.err


def test_check_asks_an_exporter_too(mpq: Mpq, plan_file: Path, source: Path) -> None:
    ran = mpq("check", plan_file, source, "--backend", "plain", "--json")
    assert ran.code == 0
    assert [change["layer"] for change in json.loads(ran.out)["changes"]] == ["fc", "last"]
    assert mpq("check", plan_file, source, "--backend", "widths").code == 0
