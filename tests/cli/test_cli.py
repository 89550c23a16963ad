"""`mpq` as its user meets it: results, files, and one line for everything that is wrong."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from mpq_plugins import Affine, LayerStats, LayerTable, MixQuant, Plan, Uniform, measure
from mpq_plugins.checkpoints.shards import INDEX_NAME
from mpq_plugins.cli.main import cli
from mpq_plugins.common import registry
from mpq_plugins.measurement.error import layer_stats
from mpq_plugins.weights.handles import Weight
from tests.conftest import Ran
from tests.helpers import outsider
from tests.helpers.checkpoints import harmful
from tests.helpers.nets import conv_net, tied_net
from tests.helpers.stores import has_units

Mpq = Callable[..., Ran]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small checkpoint file."""
    path = tmp_path / "net.safetensors"
    save_model(conv_net(), str(path))
    return path


@pytest.fixture
def plan_file(tmp_path: Path, checkpoint: Path) -> Path:
    """A plan for it."""
    path = tmp_path / "plan.json"
    Uniform(bits=3)(measure(checkpoint)).save(path)
    return path


def test_plan_writes_the_plan_the_library_makes(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    ran = mpq("plan", checkpoint, "--allocator", "mixquant", "--qem", 3, "-o", tmp_path / "out.json")
    assert ran.code == 0
    assert (tmp_path / "out.json").read_text() == MixQuant(qem=3)(measure(checkpoint)).to_json()
    assert "bits a weight" in ran.out
    assert f"wrote {tmp_path / 'out.json'}" in ran.out
    assert ran.err.startswith("mpq: warning: this mixquant plan is predicted to be worse than uniform widths")


def test_an_allocators_fields_are_its_options(mpq: Mpq, checkpoint: Path) -> None:
    uniform = mpq("plan", checkpoint, "-a", "uniform", "--bits", 5, "--json")
    assert set(json.loads(uniform.out)["layers"].values()) == {5}
    mixed = mpq("plan", checkpoint, "--qem", 3, "--bits", "4-5,8", "--metric", "mse", "--json")
    assert json.loads(mixed.out)["allocator"]["parameters"] == {
        "qem": 3.0, "metric": "mse", "bits": [4, 5, 8], "baseline": 8,
    }  # fmt: skip
    assert "[mixquant]" not in mpq("plan", "--allocator", "uniform", "--help").out
    assert "quantization error multiplier" in mpq("plan", "-a", "mixquant", "--help").out


def test_an_outsiders_allocator_gets_its_options_too(
    mpq: Mpq, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "load", lambda group, name: outsider.FirstLast)
    ran = mpq("plan", checkpoint, "-a", "firstlast", "--edge", 7, "--inner-bits", 2, "--generous", "--json")
    assert list(json.loads(ran.out)["layers"].values()) == [8, 2, 2, 8]
    assert "mpq: error: Missing option '--edge'" in mpq("plan", checkpoint, "-a", "firstlast").err
    assert " bits at both ends; required" in " ".join(mpq("plan", "-a", "firstlast", "--help").out.split())


@pytest.mark.parametrize("words", [["-auniform"], ["-a", "mixquant", "-a", "uniform"], ["--allocator=uniform"]])
def test_an_allocator_may_be_named_in_any_spelling(mpq: Mpq, checkpoint: Path, words: list[str]) -> None:
    ran = mpq("plan", checkpoint, *words, "--json")
    assert json.loads(ran.out)["allocator"]["name"] == "uniform"


def test_names_with_brackets_are_printed_as_they_are(mpq: Mpq, tmp_path: Path) -> None:
    save_file({"a[/b].weight": torch.randn(4, 4)}, tmp_path / "net[v2].safetensors")
    plan = tmp_path / "plan[v2].json"
    assert "wrote" in mpq("plan", tmp_path / "net[v2].safetensors", "-o", plan).out
    assert "a[/b]" in mpq("show", plan).out
    assert "plan[v2].json:" in mpq("diff", plan, plan).out


def test_json_knows_no_infinity(mpq: Mpq, tmp_path: Path) -> None:
    save_file({"fc.weight": torch.ones(4, 4)}, tmp_path / "net.safetensors")
    ran = mpq("measure", tmp_path / "net.safetensors", "--metrics", "sqnr_db", "--json")
    assert json.loads(ran.out, parse_constant=str)["layers"]["fc"]["errors"]["sqnr_db"] == [None] * 8


def test_mpq_alone_shows_its_help(mpq: Mpq) -> None:
    ran = mpq()
    assert ran.code == 2
    assert all(f"\n  {name} " in ran.out for name in cli.commands)


def test_several_values_give_a_plan_each_from_one_measurement(
    mpq: Mpq, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(weight: Weight, *rest: Any) -> LayerStats:
        calls.append(weight.name)
        return layer_stats(weight, *rest)

    monkeypatch.setattr(import_module("mpq_plugins.measurement.measure"), "layer_stats", counted)
    ran = mpq("plan", checkpoint, "--qem", 2, "--qem", 3.5, "-o", tmp_path / "plans", "--json")
    assert len(json.loads(ran.out)) == 2
    assert len(calls) == 4
    names = sorted(path.name for path in (tmp_path / "plans").iterdir())
    assert names == ["mixquant-qem=2.json", "mixquant-qem=3.5.json"]
    assert Plan.load(tmp_path / "plans" / names[1]).allocator.parameters["qem"] == 3.5


def test_a_table_is_measured_once_and_reused(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    table = tmp_path / "net.mpqt"
    first = mpq("plan", checkpoint, "--qem", 3, "--table", table, "-o", tmp_path / "a.json")
    stamp = table.stat().st_mtime_ns
    second = mpq("plan", checkpoint, "--qem", 3, "--table", table, "-o", tmp_path / "b.json")
    direct = mpq("plan", table, "--qem", 3, "-o", tmp_path / "c.json")
    assert (first.code, second.code, direct.code) == (0, 0, 0)
    assert f"reusing the measurement in {table}" in second.err
    assert table.stat().st_mtime_ns == stamp
    texts = {(tmp_path / name).read_text() for name in ("a.json", "b.json", "c.json")}
    assert len(texts) == 1
    again = mpq("plan", checkpoint, "--qem", 3, "--table", table, "--symmetric")
    assert "measuring again" in again.err
    assert LayerTable.load(table).scheme == Affine(symmetric=True)


def test_a_factory_is_called_once_and_its_table_reused(
    mpq: Mpq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def unfoldable() -> torch.nn.Module:
        calls.append(1)
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))

    monkeypatch.setattr(outsider, "unfoldable", unfoldable, raising=False)
    arguments = ("plan", "tests.helpers.outsider:unfoldable", "--table", tmp_path / "net.mpqt")
    assert mpq(*arguments).code == 0
    assert "reusing the measurement" in mpq(*arguments).err
    assert mpq(*arguments, "--symmetric").code == 0
    assert len(calls) == 3


@pytest.mark.parametrize("change", ["weights", "skip", "bits"])
def test_a_table_of_something_else_is_measured_again(mpq: Mpq, checkpoint: Path, tmp_path: Path, change: str) -> None:
    table = tmp_path / "net.mpqt"
    mpq("plan", checkpoint, "-a", "uniform", "--bits", 4, "--table", table)
    more: list[str] = []
    if change == "weights":
        net = conv_net()
        with torch.no_grad():
            net.fc.weight.mul_(1.5)
        save_model(net, str(checkpoint))
    elif change == "skip":
        more = ["--skip", "up"]
    bits = 5 if change == "bits" else 4
    ran = mpq("plan", checkpoint, "-a", "uniform", "--bits", bits, "--table", table, *more)
    assert ran.code == 0
    assert "measuring again" in ran.err


@pytest.mark.slow
def test_measure_prints_saves_and_counts_macs(mpq: Mpq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = mpq("measure", "tests.helpers.nets:conv_net", "--input-shape", "1,3,8,8", "-o", tmp_path / "net.mpqt")
    assert ran.code == 0
    assert "MACs" in ran.out
    assert LayerTable.load(tmp_path / "net.mpqt").layers[0].macs == 8 * 64 * 27
    assert mpq("show", tmp_path / "net.mpqt").out.splitlines()[0] == ran.out.splitlines()[0]
    shown = json.loads(
        mpq("measure", "tests.helpers.nets:tied_net", "--metrics", "rmse,mse", "--bits", "2,4", "--json").out
    )
    assert shown["layers"]["block"]["errors"].keys() == {"mse", "rmse"}
    assert len(shown["layers"]["block"]["errors"]["mse"]) == 2


def test_scheme_options_reach_the_plan(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    mpq("plan", checkpoint, "-a", "uniform", "--granularity", "per_channel", "--symmetric", "--range", "mse",
        "--only", "conv*", "--skip", "conv2", "--activation-bits", 8, "-o", out)  # fmt: skip
    plan = Plan.load(out)
    assert str(plan.layers[0].scheme) == "symmetric per_channel mse"
    assert (list(plan.by_name), plan.skipped, plan.layers[0].activation_bits) == (["conv1"], ("conv2", "fc", "up"), 8)
    mpq("plan", checkpoint, "-a", "uniform", "--group-size", 3, "--only", "conv1", "-o", out)
    assert str(Plan.load(out).layers[0].scheme) == "asymmetric per_group(3) minmax"
    for words in (["--full-range"], ["--symmetric", "--full-range"]):
        mpq("plan", checkpoint, "-a", "uniform", *words, "--scale-dtype", "float16", "--only", "conv1", "-o", out)
        assert Plan.load(out).layers[0].scheme == Affine(symmetric="full", scale_dtype="float16")
    ran = mpq("plan", checkpoint, "--full-range", "--asymmetric")
    assert ran.code == 2
    assert "symmetric: --asymmetric and --full-range exclude each other" in ran.err
    assert "full_range: means nothing" not in ran.err
    ran = mpq("plan", checkpoint, "--full-range", "--scheme", "codebook")
    assert "symmetric: means nothing with the codebook scheme" in ran.err


def test_what_was_left_alone_is_said(mpq: Mpq, tmp_path: Path) -> None:
    save_file({"fc.weight": torch.randn(4, 4), "table": torch.ones(3, 3)}, tmp_path / "net.safetensors")
    ran = mpq("plan", tmp_path / "net.safetensors")
    assert "left alone, no quantizable layer: table (its name does not end in .weight)" in ran.err


def test_show_and_diff(mpq: Mpq, checkpoint: Path, plan_file: Path, tmp_path: Path) -> None:
    shown = mpq("show", plan_file)
    assert "conv1" in shown.out
    assert "smaller than fp32" in shown.out
    assert json.loads(mpq("show", plan_file, "--json").out)["layers"] == dict.fromkeys(
        ["conv1", "conv2", "fc", "up"], 3
    )
    other = tmp_path / "other.json"
    MixQuant(qem=3)(measure(checkpoint)).save(other)
    assert "4 of 4 layers differ" in mpq("diff", plan_file, other).out
    changed = json.loads(mpq("diff", plan_file, other, "--json").out)["layers"]
    assert changed["conv1"]["before"] == 3
    assert "0 of 4 layers differ" in mpq("diff", plan_file, plan_file).out


def test_check_and_apply(mpq: Mpq, checkpoint: Path, plan_file: Path, tmp_path: Path) -> None:
    assert "4 layers, names and shapes agree" in mpq("check", plan_file, checkpoint).out
    assert json.loads(mpq("check", plan_file, checkpoint, "--json").out) == {"ok": True, "problems": [], "notes": []}
    out = tmp_path / "out.safetensors"
    ran = mpq("apply", checkpoint, plan_file, "-o", out)
    assert ran.code == 0
    assert load_file(out)["fc.weight"].unique().numel() <= 8
    noted = mpq("check", plan_file, out)
    assert noted.code == 0
    assert "not those it was made from" in noted.err


def test_plugins_are_listed(mpq: Mpq) -> None:
    assert "mixquant" in mpq("plugins").out
    assert {plugin["name"] for plugin in json.loads(mpq("plugins", "--json").out)} >= {"mixquant", "uniform"}


def bad_inputs(folder: Path, plan_file: Path, checkpoint: Path) -> dict[str, tuple[list[Any], str]]:
    """name -> (arguments, what the one line must say)."""
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "escape").mkdir()
    (folder / "escape" / INDEX_NAME).write_text(json.dumps({"weight_map": {"a.weight": "../net.safetensors"}}))
    (folder / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:-40])
    harmful(folder / "harm.pt", folder / "harm-was-done", legacy=False)
    newer = json.loads(plan_file.read_text()) | {"version": 6}
    (folder / "newer.json").write_text(json.dumps(newer))
    save_model(tied_net(), str(folder / "tied.safetensors"))
    save_file({"fc.weight": torch.tensor([[1.0, float("nan")]])}, folder / "nan.safetensors")
    np.save(folder / "array.npy", np.ones(3))
    out = ["-o", folder / "out.json", "--force"]  # which lets no error pass
    return {
        "missing file": (["plan", folder / "none.safetensors", *out], "none.safetensors: no such file"),
        "no weights": (["plan", folder / "empty", *out], "empty: no weights there"),
        "truncated": (["plan", folder / "cut.safetensors", *out], "cut.safetensors: truncated"),
        "outside": (["plan", folder / "escape", *out], "outside its directory"),
        "pickle": (["plan", folder / "harm.pt", *out], "harm.pt: refused, for reading it would execute code"),
        "not a checkpoint": (["plan", folder / "array.npy", *out], "array.npy: "),
        "newer plan": (["show", folder / "newer.json"], "newer.json: plan version 6"),
        "newer plan to apply": (["apply", checkpoint, folder / "newer.json", *out], "newer.json: plan version 6"),
        "another model": (["check", plan_file, folder / "tied.safetensors"], "made for another model"),
        "another to apply": (["apply", folder / "tied.safetensors", plan_file, *out], "made for another model"),
        "bits 0": (["plan", checkpoint, "-a", "uniform", "--bits", 0, *out], "bits: 0 is not allowed; 1 to 8"),
        "bits 9": (["plan", checkpoint, "-a", "uniform", "--bits", 9, *out], "bits: 9 is not allowed; 1 to 8"),
        "measure bits 9": (["measure", checkpoint, "--bits", "8-9", *out], "bits: 9 is not allowed; 1 to 8"),
        "bits abc": (["measure", checkpoint, "--bits", "abc", *out], "'abc' is no list of integers"),
        "qem 0": (["plan", checkpoint, "--qem", 0, *out], "qem: 0.0 is not allowed; a number above 0"),
        "qem -1": (["plan", checkpoint, "--qem", -1, *out], "qem: -1.0 is not allowed"),
        "qem text": (["plan", checkpoint, "--qem", "two", *out], "'two' is not a valid float"),
        "glob": (["plan", checkpoint, "--skip", "nothing*", *out], "skip: 'nothing*' matches none of the 4 layers"),
        "only": (["plan", checkpoint, "--only", "nothing*", *out], "only: 'nothing*' matches none of the 4 layers"),
        "all skipped": (["plan", checkpoint, "--skip", "*", *out], "All 4 layers are skipped"),
        "nan": (["plan", folder / "nan.safetensors", *out], "layer 'fc': holds NaN or infinite weights"),
        "allocator": (["plan", checkpoint, "-a", "mixqant", *out], "'mixqant' is not installed; there are budget"),
        "metric": (["plan", checkpoint, "--metric", "rms", *out], "metric: 'rms' is not allowed"),
        "granularity": (["plan", checkpoint, "--granularity", "rows", *out], "granularity: 'rows' is not allowed"),
        "fold": (["plan", checkpoint, "--fold-bn", "yes", *out], "a checkpoint does not say which BatchNorm"),
        "factory": (["plan", "no.such:thing", *out], "no.such:thing: the function cannot be found"),
        "not a module": (["plan", "json:JSONDecoder", *out], "returned a JSONDecoder; a torch.nn.Module is needed"),
        "output folder": (["plan", checkpoint, "-o", folder / "none" / "out.json"], "out.json: there is no folder"),
        "option": (["plan", checkpoint, "--qwem", 3, *out], "No such option"),
        "no source": (["plan", *out], "Missing argument 'SOURCE'"),
        "command": (["plann"], "No such command 'plann'"),
        "over the source": (["plan", checkpoint, "-o", checkpoint], "is the source itself"),
        "table over the source": (["plan", checkpoint, "--table", checkpoint, *out], "is the source itself"),
        "measure over the source": (["measure", checkpoint, "-o", checkpoint], "is the source itself"),
        "no folder": (["plan", checkpoint, "--qem", 2, "--qem", 3, "-o", folder / "no" / "dir"], "there is no folder"),
        "over the plan": (["apply", checkpoint, plan_file, "-o", plan_file], "is the source itself, or another result"),
        "over the table": (["plan", checkpoint, "--table", folder / "t", "-o", folder / "t"], "or another result"),
        "a pipe": (["plan", checkpoint, "-o", folder / "pipe"], "no ordinary file"),
        "long output": (["plan", checkpoint, "-o", folder / ("x" * 300)], "cannot write there"),
        "factory that exits": (["plan", "sys:exit", *out], "the factory cannot be called (SystemExit"),
        "long name": (["plan", "x" * 300, *out], "no such file"),
        "huge list": (["measure", checkpoint, "--bits", "2-99999999999", *out], "goes beyond"),
        "table as weights": (["plan", plan_file, *out], "plan.json: "),
    }  # fmt: skip


@pytest.fixture
def cases(tmp_path: Path, plan_file: Path, checkpoint: Path) -> dict[str, tuple[list[Any], str]]:
    return bad_inputs(tmp_path, plan_file, checkpoint)


def test_bad_input_is_one_clear_line_and_touches_nothing(
    mpq: Mpq, tmp_path: Path, cases: dict[str, tuple[list[Any], str]]
) -> None:
    MixQuant()(measure(conv_net())).save(tmp_path / "out.json")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, (arguments, message) in cases.items():
        ran = mpq(*arguments)
        assert ran.code == 2, name
        assert message in ran.err, (name, ran.err)
        assert ran.err.startswith("mpq: error: "), name
        assert ran.err.count("\n") == 1, (name, ran.err)
        assert ran.out == "", name
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_progress_is_drawn_on_a_terminal_only(tmp_path: Path) -> None:
    save_file({f"layer{i}.weight": torch.randn(64, 64) for i in range(4)}, tmp_path / "net.safetensors")
    command = [sys.executable, "-m", "mpq_plugins", "plan", str(tmp_path / "net.safetensors"), "--json"]
    quiet = subprocess.run(command, capture_output=True, check=True)
    assert quiet.stderr == b""
    master, slave = pty.openpty()
    drawn = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave) as process:
        os.close(slave)
        with suppress(OSError):  # how Linux says that the other end is closed
            while piece := os.read(master, 65536):  # as it comes, for a terminal's buffer is small
                drawn += piece
        assert process.stdout is not None
        printed = process.stdout.read()
    assert process.returncode == 0
    assert b"measuring" in drawn
    assert json.loads(printed)["layers"]["layer0"]


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    save_file({f"layer{i}.weight": torch.randn(2048, 2048) for i in range(24)}, tmp_path / "net.safetensors")
    (tmp_path / "out.mpqt").write_text("old")
    command = [sys.executable, "-m", "mpq_plugins", "measure", str(tmp_path / "net.safetensors"), "--range", "mse",
               "--force", "-o", str(tmp_path / "out.mpqt")]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not has_units(tmp_path / "out.mpqt.partial") and time.monotonic() < end:
        time.sleep(0.05)  # a first unit is finished: well before the end of some 100 million weights
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    kept, said = filter(None, err.splitlines())
    assert "what is finished is kept in" in kept
    assert said == "mpq: interrupted; nothing half written"
    assert (tmp_path / "out.mpqt").read_text() == "old"
    names = ["net.safetensors", "out.mpqt", "out.mpqt.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
