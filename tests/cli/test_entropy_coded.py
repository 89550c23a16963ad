"""What the commands say of a plan with steps of its own and promised sizes."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_model

from mpq_plugins import EntropyCoded, Plan, Uniform, apply, measure
from mpq_plugins.report.tables import bits_summary
from tests.conftest import Ran
from tests.helpers.nets import conv_net
from tests.helpers.plans import linear, plan_of, with_layer

Mpq = Callable[..., Ran]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save_model(conv_net(), str(path))
    return path


@pytest.fixture
def plan_file(tmp_path: Path, checkpoint: Path) -> Path:
    plan = Uniform(bits=8)(measure(checkpoint, EntropyCoded(), (8,), skip=["up"]))
    for layer in plan.layers:
        plan = with_layer(plan, layer.name, scheme=EntropyCoded(step=0.05), coded_bytes=layer.numel // 4)
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def said(ran: Ran) -> str:
    """What a command prints, without the lines of its tables."""
    assert ran.code == 0, ran.err
    return re.sub(r"[│┃\s]+", " ", ran.out)


def changed(plan_file: Path, layer: str, **changes: object) -> Path:
    other = with_layer(Plan.load(plan_file), layer, **changes)
    other.save(plan_file.with_name("other.json"))
    return plan_file.with_name("other.json")


def test_show_says_what_is_promised(mpq: Mpq, plan_file: Path) -> None:
    shown = said(mpq("show", plan_file, "-v"))
    assert re.search(r"conv1 conv2d \S+ 2\.00 coded ", shown)
    assert re.search(r"weights only [0-9]+ B, 2\.000 bits a weight", shown)
    assert "entropy-coded, step 0.05" in shown
    layers = json.loads(mpq("show", plan_file, "--json").out)["layers"]
    numel = {layer.name: layer.numel for layer in Plan.load(plan_file).layers}
    assert layers == {name: {"bits": 8, "coded_bytes": count // 4} for name, count in numel.items()}


def test_diff_says_which_promise_changed(mpq: Mpq, plan_file: Path) -> None:
    numel = Plan.load(plan_file).by_name["conv1"].numel
    for changes, expected in (
        ({"coded_bytes": numel // 8}, "conv1 2.00 coded 1.00 coded "),
        ({"scheme": EntropyCoded(step=0.06)}, "conv1 2.00 coded 2.00 coded scheme "),
        ({"coded_bytes": None}, "conv1 2.00 coded 8 "),
    ):
        found = said(mpq("diff", plan_file, changed(plan_file, "conv1", **changes)))
        assert expected in found
        assert "1 of 3 layers differ" in found


def test_diff_says_of_promises_that_look_alike_that_they_are_not(mpq: Mpq, plan_file: Path) -> None:
    big = 10_000
    for count in (big, big + 1):
        layer = linear("fc", 100, 100, EntropyCoded(step=0.1), 8).model_copy(update={"coded_bytes": count})
        plan_of(layer).save(plan_file.with_name(f"{count}.json"))
    found = said(mpq("diff", plan_file.with_name(f"{big}.json"), plan_file.with_name(f"{big + 1}.json")))
    assert "fc 8.00 coded 8.00 coded coded_bytes " in found


def test_plans_beside_those_of_other_widths_are_summed_up(plan_file: Path) -> None:
    plan = Plan.load(changed(plan_file, "fc", coded_bytes=None, bits=32))
    rows = [[*row] for row in zip(*(column.cells for column in bits_summary(plan, plan.size()).columns), strict=True)]
    first, second = plan.by_name["conv1"].numel + plan.by_name["conv2"].numel, plan.by_name["fc"].numel
    assert [row[:2] + row[3:4] for row in rows] == [
        ["2.00 coded", "2", f"{first:,}"],
        ["float32", "1", f"{second:,}"],
    ]


def test_check_says_that_a_backend_of_integers_runs_it(mpq: Mpq, plan_file: Path, checkpoint: Path) -> None:
    pytest.importorskip("mpq_plugins.adapters.torchao")
    found = said(mpq("check", plan_file, checkpoint, "--backend", "torchao"))
    assert "torchao runs it as it is" in found
    assert "torchao stores" in found


def test_apply_makes_what_the_library_makes(mpq: Mpq, plan_file: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert mpq("check", plan_file, checkpoint).code == 0
    ran = mpq("apply", checkpoint, plan_file, "-o", tmp_path / "out.safetensors")
    assert ran.code == 0, ran.err
    made, expected = load_file(tmp_path / "out.safetensors"), apply(conv_net(), Plan.load(plan_file)).state_dict()
    assert all(made[name].equal(value) for name, value in expected.items())


def test_a_step_too_small_is_one_line(mpq: Mpq, plan_file: Path, checkpoint: Path, tmp_path: Path) -> None:
    small = changed(plan_file, "conv2", scheme=EntropyCoded(step=1e-4), coded_bytes=None)
    for command, suffix in (("apply", "safetensors"), ("compress", "mpq")):
        out = tmp_path / f"out.{suffix}"
        ran = mpq(command, checkpoint, small, "-o", out)
        assert ran.code != 0
        assert re.match(r"mpq: error: layer 'conv2': step: 0\.0001 is so small .* is the least step for it", ran.err)
        assert ran.err.count("\n") == 1
        assert not out.exists()
