"""Tables of types on the command line: measured, shown, planned from, and refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Plan, TypeTable
from tests.conftest import Ran

ME = __name__
Mpq = Callable[..., Ran]
TYPES = "mxfp4,mxfp6_e2m3,fp8_e4m3"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8), nn.Linear(8, 8)).eval()


def batches() -> list[Tensor]:
    return [torch.randn(16, 64, generator=torch.Generator().manual_seed(0))]


@pytest.fixture
def table(tmp_path: Path, mpq: Mpq) -> Path:
    ran = mpq("measure", f"{ME}:net", "--types", TYPES, "-o", tmp_path / "t.mpqt")
    assert (ran.code, "wrote" in ran.out) == (0, True)
    return tmp_path / "t.mpqt"


def test_a_plan_from_a_source_is_the_plan_from_its_table(tmp_path: Path, mpq: Mpq, table: Path) -> None:
    of_source, of_table = tmp_path / "a.json", tmp_path / "b.json"
    limit = ("--total-average-bits", 6)
    ran = mpq("plan", f"{ME}:net", "--types", TYPES, *limit, "-o", of_source)
    assert ran.code == 0
    assert "each type has a cost of its own" in ran.out
    assert mpq("plan", table, *limit, "-o", of_table).code == 0
    assert of_source.read_bytes() == of_table.read_bytes()
    plan = Plan.load(of_source)
    assert plan.size().total_average_bits <= 6
    assert {layer.type for layer in plan.layers} <= set(TYPES.split(","))
    shown = mpq("show", of_source)
    assert (shown.code, all(str(layer.type) in shown.out for layer in plan.layers)) == (0, True)


def test_a_table_is_shown_with_dashes_where_a_shape_cannot_have_a_type(mpq: Mpq, table: Path) -> None:
    shown = mpq("show", table)
    assert shown.code == 0
    row = next(line for line in shown.out.splitlines() if line.startswith("│ 3 "))
    assert row.count(" - ") == 2
    assert "fp8_e4m3" in shown.out


def test_sensitivities_are_measured_as_every_type(tmp_path: Path, mpq: Mpq) -> None:
    words = ("--types", TYPES, "--sensitivity", "output_mse", "--calibrate", f"{ME}:batches")
    ran = mpq("measure", f"{ME}:net", *words, "-o", tmp_path / "t.mpqt", "--json")
    assert ran.code == 0
    layers = json.loads(ran.out)["layers"]
    assert layers["0"]["types"]["mxfp4"]["bits_a_weight"] == 4.25
    assert layers["0"]["types"]["mxfp4"]["sensitivities"]["output_mse"] > 0
    assert list(layers["3"]["types"]) == ["fp8_e4m3"]
    assert TypeTable.load(tmp_path / "t.mpqt").column("mxfp4").table.sensitivities == ("output_mse",)
    plan = mpq("plan", tmp_path / "t.mpqt", "--sensitivity", "output_mse", "--total-average-bits", 7)
    assert plan.code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan", f"{ME}:net", "--types", "mxfp5"), "types: 'mxfp5' is not allowed"),
        (("plan", f"{ME}:net", "--types", "mx"), "types: layer '3' has the shape [8, 8], whose inputs do not divide"),
        (("plan", f"{ME}:net", "--types", TYPES, "-a", "mixquant", "--qem", "2"), "allocator: mixquant needs widths"),
        (("plan", f"{ME}:net", "--types", TYPES, "--granularity", "per_channel"), "granularity: means nothing with"),
        (("plan", f"{ME}:net", "--types", TYPES, "--total-average-bits", "3"), "cannot be reached: the least is"),
        (("plan", f"{ME}:net", "--types", TYPES, "--judge", "mse"), "judge: means nothing with types"),
        (
            ("plan", f"{ME}:net", "--types", TYPES, "--average-bits", "8", "--pin", "3=mxfp4"),
            "layer '3' cannot be mxfp4",
        ),
        (
            ("plan", f"{ME}:net", "--average-bits", "8", "--pin", "3=mxfp4"),
            "pin: '3=mxfp4' names a type, and this table",
        ),
        (("measure", f"{ME}:net", "--types", TYPES, "--bits", "4"), "--bits means nothing with --types"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(mpq: Mpq, words: tuple[str, ...], message: str) -> None:
    ran = mpq(*words)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert message in ran.err


def test_a_table_of_types_is_measured_already(mpq: Mpq, table: Path) -> None:
    ran = mpq("plan", table, "--types", TYPES)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "is measured already" in ran.err
    for command in ("sweep", "pareto"):
        ran = mpq(command, table)
        assert (ran.code, ran.err.count("\n")) == (2, 1)
        assert "table of types" in ran.err
