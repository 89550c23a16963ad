"""Plans of every allocator at the same sizes."""

import csv
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model

from mpq_plugins import Affine, LayerTable, MixQuant, PlanWarning, SettingError, measure
from mpq_plugins.allocation.objective import predicted
from mpq_plugins.evaluation.pareto import PER_CHANNEL, PER_LAYER, mixquant_at, pareto, ptilmpq_at
from tests.conftest import Ran
from tests.helpers.nets import conv_net

Mpq = Callable[..., Ran]
SCHEME = Affine(granularity="per_channel", range="mse")


@pytest.fixture(scope="module")
def table() -> LayerTable:
    return measure(conv_net(), SCHEME, range(1, 9), per_channel=True)


def calibration() -> list[torch.Tensor]:
    return [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))]


def size_of_output(net: torch.nn.Module) -> float:
    with torch.no_grad():
        return float(net(calibration()[0]).square().mean())


def test_every_plan_keeps_its_budget_and_the_best_is_budgets(table: LayerTable) -> None:
    for average in (2.0, 3.0, 4.5):
        found = {one.series: one.plan for one in pareto(table, [average]) if one.series != "uniform"}
        assert set(found) == {PER_CHANNEL, PER_LAYER, "mixquant", "ptilmpq", "sqnr"}
        assert all(plan.size().average_bits <= average for plan in found.values())
        costs = {series: predicted(table, plan, "mse") or 0.0 for series, plan in found.items()}
        assert costs[PER_CHANNEL] <= costs[PER_LAYER] * (1 + 1e-9)
        assert all(costs[PER_LAYER] <= costs[series] for series in ("mixquant", "sqnr"))
        assert costs[PER_CHANNEL] <= costs["ptilmpq"] * (1 + 1e-9)


def test_it_warns_of_nothing_for_the_comparison_is_what_it_is_for(table: LayerTable) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlanWarning)
        pareto(table, [2.5, 4.0])


def test_mixquant_at_a_size_is_the_largest_plan_that_fits(table: LayerTable) -> None:
    plan = mixquant_at(table, 4.0, table.bits)
    assert plan is not None
    qem = plan.allocator.parameters["qem"]
    finer = [MixQuant(qem=qem * share, bits=tuple(range(2, 9)))(table) for share in (0.999, 0.9, 0.7)]
    assert plan.size().average_bits <= 4.0
    assert all(other.size().average_bits > 4.0 for other in finer)


def test_an_allocator_without_a_plan_that_small_has_none(table: LayerTable) -> None:
    assert mixquant_at(table, 1.5, table.bits) is None
    assert ptilmpq_at(table, 1.0, (4, 5, 6)) is None
    assert {one.series for one in pareto(table, [1.5])} >= {"uniform", PER_CHANNEL}


def test_per_tensor_has_no_parts() -> None:
    plain = measure(conv_net(), bits=range(1, 9))
    assert PER_CHANNEL not in {one.series for one in pareto(plain, [4.0])}


@pytest.mark.parametrize(("budgets", "message"), [([], "none given"), ([0.5], "the least is 1 bits, 0.5 more")])
def test_bad_budgets_are_refused(table: LayerTable, budgets: list[float], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        pareto(table, budgets)


@pytest.mark.slow
def test_the_command_writes_table_csv_and_picture(mpq: Mpq, tmp_path: Path) -> None:
    save_model(conv_net(), str(tmp_path / "net.safetensors"))
    files = "-o", tmp_path / "front.csv", "--plot", tmp_path / "front.png"
    ran = mpq("pareto", tmp_path / "net.safetensors", "--budgets", "3,4", *files)
    assert ran.code == 0, ran.err
    for series in (PER_CHANNEL, PER_LAYER, "mixquant", "ptilmpq", "sqnr", "uniform"):
        assert series in ran.out
    rows = list(csv.DictReader((tmp_path / "front.csv").read_text().splitlines()))
    assert {row["series"] for row in rows} == {PER_CHANNEL, PER_LAYER, "mixquant", "ptilmpq", "sqnr", "uniform"}
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_command_corrects_and_evaluates(mpq: Mpq, tmp_path: Path) -> None:
    here = "tests.evaluation.test_pareto"
    common = "pareto", "tests.helpers.nets:conv_net", "--budgets", "2", "--bits", "1-3", "--json", "--eval"
    plain = mpq(*common, f"{here}:size_of_output")
    corrected = mpq(*common, f"{here}:size_of_output", "--calibrate", f"{here}:calibration")
    assert (plain.code, corrected.code) == (0, 0), plain.err + corrected.err
    scores = [[row["scores"]["score"] for row in json.loads(ran.out)["rows"]] for ran in (plain, corrected)]
    float_score = scores[0][0]
    assert scores[1][0] == float_score
    apart = [sum(abs(score - float_score) for score in own) for own in scores]
    assert apart[1] < apart[0]


def test_bad_input_is_one_line(mpq: Mpq, tmp_path: Path) -> None:
    save_model(conv_net(), str(tmp_path / "net.safetensors"))
    for arguments, said in (
        (["--budgets", "0.2"], "cannot be reached"),
        (["--calibrate", "tests.evaluation.test_pareto:calibration"], "add --eval"),
        (["--sensitivity", "kl"], "was not measured"),
        (["--plot", tmp_path / "front.txt"], "should end in"),
    ):
        ran = mpq("pareto", tmp_path / "net.safetensors", *arguments)
        assert (ran.code, len(ran.err.splitlines())) == (2, 1), ran.err
        assert said in ran.err
