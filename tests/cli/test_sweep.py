"""`mpq sweep` as its user meets it."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from mpq_plugins import LayerTable, MixQuant, measure
from tests.conftest import Ran
from tests.helpers.nets import conv_net

Mpq = Callable[..., Ran]

evaluations = 0
stop_at = -1


def net() -> nn.Module:
    return conv_net()


def shifted_net() -> nn.Module:
    model = conv_net()
    with torch.no_grad():
        model.bn1.bias.add_(1)
    return model


def moves_away(model: nn.Module) -> float:
    print("moved")
    if Path("elsewhere").is_dir():
        os.chdir("elsewhere")
    return 1.0


def other_net() -> nn.Module:
    return nn.Linear(3, 3)


def score(model: nn.Module) -> dict[str, float]:
    """Closeness to the float network's output on one input."""
    global evaluations
    if evaluations == stop_at:
        raise KeyboardInterrupt
    evaluations += 1
    image = torch.ones(1, 3, 8, 8)
    with torch.no_grad():
        return {"closeness": -float((model(image) - conv_net()(image)).abs().sum()), "evaluations": evaluations}


HERE = "tests.cli.test_sweep"


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{HERE}.evaluations", 0)
    monkeypatch.setattr(f"{HERE}.stop_at", -1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save_model(conv_net(), str(path))
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_grid_of_qems_from_a_file(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    ran = mpq("sweep", checkpoint, "--qem", "1.5:3:0.5", "--no-uniform", "-o", tmp_path / "out.csv")
    assert ran.code == 0
    rows = read(tmp_path / "out.csv")
    assert [row["param_qem"] for row in rows] == ["1.5", "2.0", "2.5", "3.0"]
    for row in rows:
        size = MixQuant(qem=float(row["param_qem"]))(measure(checkpoint)).size()
        assert int(row["total_bytes"]) == size.total_bytes
        assert float(row["average_bits"]) == size.average_bits
    assert "plan, qem" in ran.out
    assert f"wrote {tmp_path / 'out.csv'}" in ran.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.safetensors", "out.csv"]


@pytest.mark.slow
def test_alpha_times_beta_with_an_evaluation_and_a_plot(mpq: Mpq, tmp_path: Path) -> None:
    grid = ("--alpha", "0,0.5,1", "--beta-important", 0.25, "--beta-important", 0.5)
    files = ("-o", tmp_path / "out.csv", "--plot", tmp_path / "out.png")
    ran = mpq("sweep", f"{HERE}:net", "-a", "ptilmpq", *grid, "--eval", f"{HERE}:score", *files)
    assert ran.code == 0, ran.err
    rows = read(tmp_path / "out.csv")
    swept = [row for row in rows if row["allocator"] == "ptilmpq"]
    assert [(row["param_alpha"], row["param_beta_important"]) for row in swept] == [
        (alpha, beta) for alpha in ("0.0", "0.5", "1.0") for beta in ("0.25", "0.5")
    ]
    assert rows[0]["allocator"] == "float"
    assert float(rows[0]["score_closeness"]) == 0
    assert {row["allocator"] for row in rows} == {"float", "ptilmpq", "uniform"}
    assert all(float(row["mse_error"]) > 0 for row in rows[1:])
    assert evaluations == len(rows)
    assert "no other plan that is as small is as good in closeness" in ran.out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_range_is_in_decimals_and_holds_both_ends(mpq: Mpq, checkpoint: Path) -> None:
    rows = json.loads(mpq("sweep", checkpoint, "-a", "ptilmpq", "--alpha", "0.1:0.9:0.1", "--json").out)["rows"]
    found = [row["parameters"]["alpha"] for row in rows if row["allocator"] == "ptilmpq"]
    assert found == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def test_a_sweep_without_values_takes_the_allocators_own_grid(mpq: Mpq, checkpoint: Path) -> None:
    swept = json.loads(mpq("sweep", checkpoint, "-a", "ptilmpq", "--beta-important", 0.5, "--json").out)["rows"]
    assert [row["parameters"]["alpha"] for row in swept if row["allocator"] == "ptilmpq"] == [k / 10 for k in range(11)]
    one = json.loads(mpq("sweep", checkpoint, "--qem", 2, "--no-uniform", "--json").out)["rows"]
    assert [row["parameters"]["qem"] for row in one] == [2.0]
    uniform = json.loads(mpq("sweep", checkpoint, "-a", "uniform", "--json").out)["rows"]
    assert [row["parameters"]["bits"] for row in uniform] == list(range(2, 9))


@pytest.mark.slow
def test_an_interrupted_sweep_resumes(mpq: Mpq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("sweep", f"{HERE}:net", "-a", "ptilmpq", "--alpha", "0:1:0.25", "--no-uniform", "--eval",
               f"{HERE}:score", "-o", tmp_path / "out.csv")  # fmt: skip
    monkeypatch.setattr(f"{HERE}.stop_at", 3)
    stopped = mpq(*command)
    assert stopped.code == 130
    assert f"rows finished and kept: 3, in {tmp_path / 'out.csv.partial'}" in stopped.err
    assert not (tmp_path / "out.csv").exists()
    monkeypatch.setattr(f"{HERE}.stop_at", -1)
    resumed = mpq(*command)
    assert resumed.code == 0
    assert "going on: rows already in" in resumed.err
    assert "reusing the measurement" in resumed.err
    assert evaluations == 6
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]
    monkeypatch.setattr(f"{HERE}.evaluations", 0)
    mpq(*command[:-1], tmp_path / "whole.csv")
    columns = [[{**row, "score_evaluations": ""} for row in read(tmp_path / name)] for name in ("out.csv", "whole.csv")]
    assert columns[0] == columns[1]


def test_other_plans_rows_are_not_taken(mpq: Mpq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--no-uniform", "--eval", f"{HERE}:score", "-o", tmp_path / "out.csv")
    monkeypatch.setattr(f"{HERE}.stop_at", 2)
    mpq("sweep", f"{HERE}:net", "--qem", "2,3", *words)
    monkeypatch.setattr(f"{HERE}.stop_at", -1)
    assert mpq("sweep", f"{HERE}:net", "--qem", "2,3", "--symmetric", *words).code == 0
    assert evaluations == 2 + 2  # of the float model there is one


def test_another_model_or_evaluation_does_not_go_on_with_the_rows(
    mpq: Mpq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--qem", "2,3", "--no-uniform", "-o", tmp_path / "out.csv")
    monkeypatch.setattr(f"{HERE}.stop_at", 2)
    mpq("sweep", f"{HERE}:net", *words, "--eval", f"{HERE}:score")
    kept = (tmp_path / "out.csv.partial").read_bytes()
    for source, evaluation in ((f"{HERE}:shifted_net", "score"), (f"{HERE}:net", "moves_away")):
        ran = mpq("sweep", source, *words, "--eval", f"{HERE}:{evaluation}")
        assert ran.code == 2
        assert "out.csv.partial: holds what another job finished (it differs in " in ran.err
        assert (tmp_path / "out.csv.partial").read_bytes() == kept


def test_files_that_are_not_ours_are_left_alone(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    words = ("--qem", 2, "--eval", f"{HERE}:score", "-o", tmp_path / "out.csv")
    for name in ("out.csv.partial", "out.csv.partial.mpqt"):
        (tmp_path / name).write_text("my notes")
        assert mpq("sweep", f"{HERE}:net", *words).code == 2
        assert (tmp_path / name).read_text() == "my notes"
        (tmp_path / name).unlink()
    table = tmp_path / "out.csv.partial"
    measure(conv_net()).save(table)
    before = table.read_bytes()
    assert mpq("sweep", table, "--model", f"{HERE}:net", *words).code == 2
    assert mpq("sweep", f"{HERE}:net", *words, "--table", table).code == 2
    assert table.read_bytes() == before
    table.unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_an_evaluation_may_change_directory_and_print(
    mpq: Mpq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    ran = mpq(
        "sweep", f"{HERE}:net", "--qem", 2, "--no-uniform", "--eval", f"{HERE}:moves_away", "-o", "out.csv", "--json"
    )
    assert ran.code == 0
    assert len(json.loads(ran.out)["rows"]) == 2
    assert "moved" in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out.csv"]


def test_a_size_is_swept_and_the_csv_keeps_sizes_and_targets_apart(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    ran = mpq(
        "sweep", checkpoint, "-a", "ptilmpq", "--average-bits", "5.2,5.7", "--no-uniform", "-o", tmp_path / "o.csv"
    )
    assert ran.code == 0
    for row, target in zip(read(tmp_path / "o.csv"), (5.2, 5.7), strict=True):
        assert float(row["param_average_bits"]) == target
        assert float(row["average_bits"]) <= target
        assert 0 <= float(row["found_alpha"]) <= 1
    one = mpq("sweep", checkpoint, "-a", "ptilmpq", "--average-bits", 5.5, "--json")
    assert one.code == 0
    assert len([row for row in json.loads(one.out)["rows"] if row["allocator"] == "ptilmpq"]) == 1


def test_an_outsiders_allocator_is_swept(mpq: Mpq, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpq_plugins.common import registry
    from tests.helpers import outsider

    monkeypatch.setattr(registry, "load", lambda group, name: outsider.FirstLast)
    ran = mpq("sweep", checkpoint, "-a", "firstlast", "--edge", "6,8", "--inner-bits", "3,4", "--no-uniform", "--json")
    assert [tuple(row["parameters"].values())[:2] for row in json.loads(ran.out)["rows"]] == [
        (6, 3), (6, 4), (8, 3), (8, 4)
    ]  # fmt: skip


def test_a_table_needs_the_model_to_be_named(mpq: Mpq, tmp_path: Path) -> None:
    table = tmp_path / "net.mpqt"
    measure(conv_net()).save(table)
    refused = mpq("sweep", table, "--qem", "2,3", "--eval", f"{HERE}:score")
    assert refused.code == 2
    assert "only a module can be evaluated; name its model with --model package.module:factory" in refused.err
    ran = mpq("sweep", table, "--qem", "2,3", "--eval", f"{HERE}:score", "--model", f"{HERE}:net", "--json")
    assert [row["allocator"] for row in json.loads(ran.out)["rows"][:3]] == ["float", "mixquant", "mixquant"]


def test_per_tensor_parts_have_no_error_and_that_is_said(mpq: Mpq, checkpoint: Path) -> None:
    ran = mpq("sweep", checkpoint, "-a", "ptilmpq", "--granularity", "per_tensor")
    assert ran.code == 0
    assert "- where the table cannot tell" in ran.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval", "tests"], "tests: names no function; write package.module:function"),
        (["--eval", f"{HERE}:nothing", "--model", f"{HERE}:net"], "nothing: the function cannot be found"),
        (["--eval", f"{HERE}:HERE", "--model", f"{HERE}:net"], "is a str; a function is needed"),
        (["--eval", f"{HERE}:score", "--model", f"{HERE}:other_net"], "the plan was made for another model"),
        (["--model", f"{HERE}:net"], "model: is only used with --eval"),
        (["--plot", "no/such/plot.png"], "no/such. Make it, or choose another path"),
        (["--plot", "plot.jpg"], "plot.jpg should end in .png, .svg, .pdf"),
        (["-o", "tests"], "is no file; name another output"),
        (["-a", "ptilmpq", "--alpha", "0:1:Infinity"], "'0:1:Infinity' is no range"),
        (["-a", "ptilmpq", "--alpha", "0:1:0.001", "--beta-important", "0:1:0.001"], "more than 10,000 combinations"),
        (
            ["-a", "mixquant", "--alpha", "0.5"],
            "No such option '--alpha' for the allocator mixquant; it belongs to ptilmpq: add -a ptilmpq",
        ),
        (["--qem", "2", "--alpha", "0.5"], "--qem belongs to mixquant; --alpha belongs to ptilmpq. Leave one out"),
        (["--judge", "kl"], "'kl' was not measured; this table has relative, mse"),
        (["-a", "ptilmpq", "--average-bits", "1"], "average_bits: 1 cannot be reached"),
        (["--qem", "2:1:0.5"], "'2:1:0.5' has no end"),
        (["--qem", "1:2"], "'1:2' is no range; write first:last:step"),
        (["--qem", "-1"], "qem: -1.0 is not allowed"),
        (["-a", "ptilmpq", "--alpha", "0.5,1.5"], "alpha: 1.5 is not allowed; a share from 0 to 1"),
        (["-a", "ptilmpq", "--other-bits", "2,1"], "1 is not allowed with two regions"),
        (["-a", "nothing"], "'nothing' is not installed"),
        (["--breakpoint", "search"], "breakpoint: means nothing with the affine scheme"),
        (["--scheme", "piecewise", "--symmetric"], "symmetric: means nothing with the piecewise scheme"),
    ],
)
def test_bad_input_is_one_clear_line(
    mpq: Mpq, checkpoint: Path, tmp_path: Path, words: list[Any], message: str
) -> None:
    ran = mpq("sweep", checkpoint, "-o", tmp_path / "out.csv", *words)
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_without_matplotlib_a_plot_is_refused_before_the_work(
    mpq: Mpq, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ran = mpq("sweep", checkpoint, "--plot", tmp_path / "out.png")
    assert ran.code == 2
    assert "pip install 'mpq-plugins[report]'" in ran.err


def test_the_source_is_never_overwritten(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    before = checkpoint.read_bytes()
    for words in (["-o", checkpoint], ["--plot", checkpoint], ["--table", checkpoint]):
        assert mpq("sweep", checkpoint, *words).code == 2
    assert checkpoint.read_bytes() == before


def test_the_measurement_is_kept_where_it_is_asked_for(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    mpq("sweep", checkpoint, "--qem", 2, "-o", tmp_path / "out.csv", "--table", tmp_path / "net.mpqt")
    assert LayerTable.load(tmp_path / "net.mpqt").bits == tuple(range(2, 9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.mpqt", "net.safetensors", "out.csv"]
