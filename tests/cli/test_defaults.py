"""Defaults from mpq.toml and pyproject.toml: what they give, what goes before them, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from mpq_plugins import LayerTable
from tests.conftest import Ran
from tests.helpers.nets import conv_net

Mpq = Callable[..., Ran]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_model(conv_net(), str(tmp_path / "net.safetensors"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(mpq: Mpq, *words: Any) -> dict[str, Any]:
    ran = mpq("plan", "net.safetensors", *words, "--json")
    assert ran.code == 0, ran.err
    document: dict[str, Any] = json.loads(ran.out)
    return document


def test_a_file_gives_defaults_and_the_command_line_goes_before_them(mpq: Mpq) -> None:
    Path("mpq.toml").write_text('average-bits = 3\n[plan]\npin = ["fc=8"]\nparts = false\n[sweep]\naverage-bits = 7\n')
    made = planned(mpq)
    assert made["allocator"]["name"] == "budget"
    assert (
        made["allocator"]["parameters"] | {"average_bits": 3.0, "pin": ["fc=8"], "parts": False}
        == (made["allocator"]["parameters"])
    )
    assert planned(mpq, "--average-bits", 5)["allocator"]["parameters"]["average_bits"] == 5
    assert planned(mpq, "--parts")["allocator"]["parameters"]["parts"] is True
    other = planned(mpq, "--size-bytes", 4000)["allocator"]["parameters"]
    assert (other["size_bytes"], other.get("average_bits")) == (4000, None)
    assert planned(mpq, "--qem", 2)["allocator"]["name"] == "mixquant"
    assert "defaults for options are read from mpq.toml" in mpq("plan", "net.safetensors").err


def test_the_files_options_choose_the_allocator_too(mpq: Mpq) -> None:
    Path("mpq.toml").write_text("[plan]\nqem = 3\nmetric = 'mse'\n")
    made = planned(mpq)["allocator"]
    assert (made["name"], made["parameters"]["qem"], made["parameters"]["metric"]) == ("mixquant", 3.0, "mse")
    assert planned(mpq, "--average-bits", 3)["allocator"]["name"] == "budget"


def symmetry(mpq: Mpq, *words: object) -> object:
    """Of the plan that is written."""
    assert mpq("plan", "net.safetensors", "-o", "plan.json", *words).code == 0
    return json.loads(Path("plan.json").read_text())["layers"][0]["scheme"]["symmetric"]


def test_several_values_are_a_plan_each_and_flags_have_both_names(mpq: Mpq) -> None:
    Path("mpq.toml").write_text("[plan]\nqem = [2, 3]\nsymmetric = true\n")
    ran = mpq("plan", "net.safetensors", "--json")
    assert [plan["allocator"]["parameters"]["qem"] for plan in json.loads(ran.out)] == [2.0, 3.0]
    Path("mpq.toml").write_text("[plan]\nfull-range = true\n")
    for words, codes in (((), "full"), (("--asymmetric",), False), (("--symmetric",), True)):
        assert symmetry(mpq, *words) == codes
    Path("mpq.toml").write_text("[plan]\nasymmetric = true\n")
    assert symmetry(mpq, "--full-range") == "full"
    Path("mpq.toml").write_text("[plan]\nno-parts = true\n")
    assert planned(mpq)["allocator"]["parameters"]["parts"] is False


def test_a_list_of_widths_is_one_list_as_on_the_command_line(mpq: Mpq) -> None:
    Path("mpq.toml").write_text("bits = [2, 4, 8]\n")
    assert planned(mpq, "--qem", 2) == planned(mpq, "--qem", 2, "--bits", "2,4,8")
    assert planned(mpq)["allocator"]["parameters"]["bits"] == [2, 4, 8]
    assert mpq("measure", "net.safetensors", "-o", "t.mpqt").code == 0
    assert LayerTable.load("t.mpqt").bits == (2, 4, 8)


def test_an_allocator_in_the_file_is_as_one_named(mpq: Mpq) -> None:
    Path("mpq.toml").write_text("allocator = 'mixquant'\n")
    assert planned(mpq)["allocator"]["name"] == "mixquant"
    assert planned(mpq, "-a", "uniform")["allocator"]["name"] == "uniform"
    refused = mpq("plan", "net.safetensors", "--average-bits", 3)
    assert refused.code == 2
    assert "No such option '--average-bits' for the allocator mixquant" in refused.err


def test_a_note_says_so_unless_it_is_to_be_quiet(mpq: Mpq) -> None:
    Path("mpq.toml").write_text("average-bits = 3\n")
    assert "defaults for options are read from mpq.toml" in mpq("plan", "net.safetensors").err
    assert mpq("plan", "net.safetensors", "-q").err == ""
    Path("mpq.toml").write_text("average-bits = 3\nquiet = true\nverbose = false\n")
    assert mpq("plan", "net.safetensors").err == ""


def test_a_broken_project_file_that_says_nothing_to_us_is_none_of_our_business(mpq: Mpq) -> None:
    Path("pyproject.toml").write_text("[project\nname = 'x'\n")
    assert mpq("plan", "net.safetensors").code == 0


def test_pyproject_is_read_from_above_and_the_nearest_wins(
    mpq: Mpq, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("pyproject.toml").write_text("[project]\nname = 'x'\n[tool.mpq]\naverage-bits = 5\n")
    below = folder / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    above = mpq("plan", folder / "net.safetensors", "--json")
    assert json.loads(above.out)["allocator"]["parameters"]["average_bits"] == 5
    (folder / "a" / "mpq.toml").write_text("average-bits = 6\n")
    nearer = mpq("plan", folder / "net.safetensors", "--json")
    assert json.loads(nearer.out)["allocator"]["parameters"]["average_bits"] == 6


def test_a_table_leaves_defaults_of_the_scheme_aside(mpq: Mpq) -> None:
    assert mpq("measure", "net.safetensors", "-o", "t.mpqt").code == 0
    Path("mpq.toml").write_text('granularity = "per_channel"\nskip = ["fc"]\n')
    assert mpq("plan", "t.mpqt", "--qem", 2).code == 0
    refused = mpq("plan", "t.mpqt", "--qem", 2, "--granularity", "per_channel")
    assert refused.code == 2
    assert "is a table, already measured" in refused.err


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("mpq.toml", "averag-bits = 3", "averag-bits: no command has an option --averag-bits. Did you mean"),
        ("mpq.toml", "[plan]\nskipp = ['a']", "[plan] skipp: `mpq plan` has no option --skipp. Did you mean skip?"),
        (
            "mpq.toml",
            "[plam]\nskip = ['a']",
            "[plam]: there is no such command, and an option takes no table. Did you mean plan?",
        ),
        ("mpq.toml", "[plan]\nskip = {a = 1}", "[plan] skip: {'a': 1} is not allowed"),
        ("mpq.toml", "[plan]\nskip = [[1]]", "[plan] skip: [[1]] is not allowed"),
        ("mpq.toml", "[plan]\naverage-bits = 'few'", "'few' is not a valid float"),
        ("mpq.toml", "[plan", "is no TOML"),
        ("pyproject.toml", "[tool]\nmpq = 3", "tool.mpq: 3 is not allowed; a table"),
        ("pyproject.toml", "[tool.mpq", "is no TOML"),
        ("mpq.toml", "force = true", "force: is said on the command line alone"),
        (
            "mpq.toml",
            "average-bits = {a = 3}",
            "[average-bits]: there is no such command, and an option takes no table",
        ),
    ],
)
def test_what_a_file_gets_wrong_is_one_line(mpq: Mpq, name: str, text: str, said: str) -> None:
    Path(name).write_text(text)
    ran = mpq("plan", "net.safetensors", "-o", "plan.json")
    assert ran.code == 2
    assert said in ran.err
    assert sum(not line.startswith("mpq: note") for line in ran.err.splitlines()) == 1
    assert not Path("plan.json").exists()


def test_two_files_at_once_are_refused(mpq: Mpq) -> None:
    Path("mpq.toml").write_text("average-bits = 3")
    Path("pyproject.toml").write_text("[tool.mpq]\naverage-bits = 3")
    assert "pyproject.toml has a [tool.mpq] too; keep one of them" in mpq("plan", "net.safetensors").err
    Path("pyproject.toml").write_text("[project]\nname = 'x'")
    assert mpq("plan", "net.safetensors").code == 0


HERE = "tests.cli.test_defaults"


def batches() -> list[Tensor]:
    return [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))]


def applied(mpq: Mpq, *words: str) -> str:
    """The rounding that `mpq apply` says."""
    ran = mpq("apply", "net.safetensors", "plan.json", "-o", "q.safetensors", "--force", "--json", *words)
    assert ran.code == 0, ran.err
    return str(json.loads(ran.out)["rounding"])


def test_a_rounding_in_the_file_is_for_runs_that_have_inputs(mpq: Mpq) -> None:
    model, on = ("--model", "tests.helpers.nets:conv_net"), ("--calibrate", f"{HERE}:batches")
    assert mpq("plan", "net.safetensors", "--bits", 3, "-a", "uniform", "--skip", "up", "-o", "plan.json").code == 0
    for word, label in (("nearest", "nearest, corrected"), ("compensated", "compensated")):
        Path("mpq.toml").write_text(f'rounding = "{word}"\n')
        assert applied(mpq) == "nearest"
        assert applied(mpq, *model, *on) == label
        assert mpq("sweep", "net.safetensors", "--qem", 2).code == 0
    assert applied(mpq, *model, *on, "--rounding", "nearest") == "nearest, corrected"


def test_inputs_on_the_command_line_go_before_those_of_the_file(mpq: Mpq) -> None:
    net = "tests.helpers.nets:conv_net"
    assert mpq("plan", net, "--bits", 3, "-a", "uniform", "--fold-bn", "no", "-o", "plan.json").code == 0
    words = ("evaluate", net, "plan.json", "--eval", f"{HERE}:score", "--json")
    shape, on = ("--synthetic", "4,3,8,8"), ("--calibrate", f"{HERE}:batches")
    wanted = [mpq(*words, *given).out for given in (shape, on)]
    Path("mpq.toml").write_text(f'calibrate = "{HERE}:batches"\n')
    by_shape = mpq(*words, *shape).out
    Path("mpq.toml").write_text('synthetic = "4,3,8,8"\n')
    by_function = mpq(*words, *on).out
    scores = [[row["scores"] for row in json.loads(out)["rows"]] for out in (*wanted, by_shape, by_function)]
    assert scores[0] == scores[2] != scores[1] == scores[3]
    Path("mpq.toml").write_text(f'calibrate = "{HERE}:batches"\nsynthetic = "4,3,8,8"\n')
    assert "give one" in mpq(*words).err


def score(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model(torch.ones(1, 3, 8, 8)).sum())
