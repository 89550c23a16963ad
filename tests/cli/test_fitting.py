"""--calibrate, --synthetic and --rounding, which are the same options wherever a plan is applied."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Affine, Plan, Uniform, apply, measure, synthetic_batches
from mpq_plugins.cli.fitting import Fitting, fitting_options
from mpq_plugins.cli.main import cli
from mpq_plugins.errors import SettingError
from mpq_plugins.reconstruction.rounding import Rounding
from tests.conftest import Ran
from tests.helpers.nets import conv_net

pytestmark = pytest.mark.usefixtures("one_thread")

Mpq = Callable[..., Ran]
ME = "tests.cli.test_fitting"
NET = "tests.helpers.nets:conv_net"
COMMANDS = ("apply", "evaluate", "pareto", "sweep")
TUNE = "tune"  # takes a module alone, so it has no --model
SCORED = ("--eval", f"{ME}:score")
ON = ("--calibrate", f"{ME}:batches")
LABELS: list[tuple[tuple[str, ...], str]] = [
    ((), "nearest"),
    (("--rounding", "nearest"), "nearest"),
    (ON, "compensated"),
    ((*ON, "--rounding", "nearest"), "nearest, corrected"),
    (("--synthetic", "8,3,8,8", "--rounding", "nearest"), "nearest, corrected"),
    (("--synthetic", "8,3,8,8"), "compensated"),
]
SHAPE = (8, 3, 8, 8)


def batches() -> list[Tensor]:
    return list(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(4)).split(8))


def score(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model(torch.ones(2, 3, 8, 8)).sum())


def applied(plan: Plan, words: tuple[str, ...]) -> nn.Module:
    """What the library makes of the same words."""
    given = batches() if "--calibrate" in words else None
    if "--synthetic" in words:
        given = list(synthetic_batches(conv_net(), SHAPE))
    rounding: Any = words[words.index("--rounding") + 1] if "--rounding" in words else None
    return apply(conv_net(), plan, calibrate=given, rounding=rounding)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    Uniform(bits=2)(measure(conv_net(), Affine(granularity="per_channel"), (2,))).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_every_command_that_applies_plans_has_them_with_the_same_words() -> None:
    options = [
        {one.name: (one.opts, one.help) for one in cli.commands[name].params if isinstance(one, click.Option)}
        for name in (*COMMANDS, TUNE)
    ]
    for name in ("calibration", "synthetic", "rounding", "model_factory"):
        assert all(own[name] == options[0][name] for own in options if name in own)
        assert [name in own for own in options] == [True] * len(COMMANDS) + [name != "model_factory"]


@pytest.mark.parametrize(
    ("calibration", "synthetic", "asked", "rounding", "label"),
    [
        (None, None, None, "nearest", "nearest"),
        ("a:b", None, None, "compensated", "compensated"),
        (None, (1, 2), None, "compensated", "compensated"),
        ("a:b", None, "nearest", "nearest", "nearest, corrected"),
        (None, (1, 2), "learned", "learned", "learned"),
    ],
)
def test_what_the_options_mean(
    calibration: str | None, synthetic: tuple[int, ...] | None, asked: str | None, rounding: Rounding, label: str
) -> None:
    fitting = Fitting(calibration, synthetic, asked)
    assert (fitting.rounding, fitting.label) == (rounding, label)
    assert fitting.calibrated == (calibration is not None or synthetic is not None)


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(SettingError, match="give one"):
        Fitting("a:b", (1, 2))
    for word in ("compensated", "learned"):
        with pytest.raises(SettingError, match="needs calibration inputs"):
            Fitting(asked=word)


def test_inputs_are_the_functions_or_made_of_the_model() -> None:
    assert Fitting().batches(conv_net()) is None
    named = Fitting(f"{ME}:batches").batches(conv_net())
    made = Fitting(synthetic=SHAPE).batches(conv_net())
    for found, expected in ((named, batches()), (made, synthetic_batches(conv_net(), SHAPE))):
        assert found is not None
        assert all(one.equal(other) for one, other in zip(found, expected, strict=True))


def test_a_command_gets_the_three_as_one_argument() -> None:
    got: list[Fitting] = []

    @click.command()
    @fitting_options
    @click.option("--other")
    def command(fitting: Fitting, other: str) -> None:
        got.append(fitting)

    command.main(["--rounding", "nearest", "--synthetic", "2,3", "--other", "x"], standalone_mode=False)
    assert got == [Fitting(None, (2, 3), "nearest")]


@pytest.mark.parametrize(("words", "label"), LABELS)
def test_evaluate_scores_what_the_library_makes(mpq: Mpq, plan: Path, words: tuple[str, ...], label: str) -> None:
    ran = mpq("evaluate", NET, plan, *SCORED, *words, "--json")
    assert ran.code == 0, ran.err
    rows = json.loads(ran.out)["rows"]
    expected = [("", score(conv_net())), ("nearest", score(apply(conv_net(), Plan.load(plan))))]
    if label != "nearest":
        expected.append((label, score(applied(Plan.load(plan), words))))
    assert [(row["rounding"], row["scores"]["score"]) for row in rows] == expected
    assert [row["corrected"] for row in rows] == [False, False, True][: len(rows)]


@pytest.mark.parametrize(("words", "label"), LABELS)
def test_sweep_scores_what_the_library_makes_and_names_it(
    mpq: Mpq, tmp_path: Path, words: tuple[str, ...], label: str
) -> None:
    out = tmp_path / "rows.csv"
    swept = ("sweep", NET, "-a", "uniform", "--bits", "2,4", "--no-uniform", *SCORED, *words)
    ran = mpq(*swept, "-o", out)
    assert ran.code == 0, ran.err
    assert f", {label}" in ran.out.splitlines()[0]
    document = json.loads(mpq(*swept, "--json").out)
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["rounding"] for row in rows] == ["", label, label]
    assert [row["rounding"] for row in document["rows"]] == ["", label, label]
    table = measure(conv_net(), bits=(2, 4))
    expected = [score(applied(Uniform(bits=bits)(table), words)) for bits in (2, 4)]
    assert [row["scores"]["score"] for row in document["rows"][1:]] == expected
    assert [float(row["score_score"]) for row in rows[1:]] == expected


def test_pareto_names_the_rounding(mpq: Mpq) -> None:
    common = ("pareto", NET, "--budgets", "3", "--bits", "2-4", *SCORED, "--json")
    scores = {}
    for words, label in (LABELS[0], LABELS[2], LABELS[3]):
        ran = mpq(*common, *words)
        assert ran.code == 0, ran.err
        exact, *rows = json.loads(ran.out)["rows"]
        assert (exact["rounding"], {row["rounding"] for row in rows}) == ("", {label})
        scores[label] = tuple(row["scores"]["score"] for row in rows)
    assert len(set(scores.values())) == 3


def test_an_interrupted_sweep_refuses_another_rounding(
    mpq: Mpq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def stopping(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return score(model)

    words = ("sweep", NET, "-a", "uniform", "--bits", "2,4", *ON, "--eval", f"{ME}:tried", "-o", tmp_path / "rows.csv")
    monkeypatch.setattr(f"{ME}.tried", stopping, raising=False)
    assert mpq(*words).code == 130
    other = mpq(*words, "--rounding", "nearest")
    assert (other.code, "it differs in rounding" in other.err) == (2, True)
    assert mpq(*words).code == 0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rounding", "compensate"), "rounding: 'compensate' is not allowed; nearest, compensated, learned. Did you"),
        (("--rounding", "learned"), "rounding: 'learned' needs calibration inputs; give calibrate=batches"),
        ((*ON, "--synthetic", "4,3,8,8"), "calibrate: --calibrate and --synthetic both say what to calibrate on; give"),
    ],
)
def test_bad_words_are_one_line(
    mpq: Mpq, plan: Path, tmp_path: Path, command: str, words: tuple[str, ...], said: str
) -> None:
    torch.save(conv_net().state_dict(), tmp_path / "net.pt")
    given: dict[str, tuple[Any, ...]] = {
        "apply": ("apply", tmp_path / "net.pt", plan, "--model", NET, "-o", tmp_path / "out.pt"),
        "evaluate": ("evaluate", NET, plan, *SCORED),
        "pareto": ("pareto", NET, *SCORED),
        "sweep": ("sweep", NET, *SCORED),
    }
    ran = mpq(*given[command], *words)
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1)
    assert said in ran.err
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("command", ["pareto", "sweep"])
@pytest.mark.parametrize("words", [ON, ("--synthetic", "4,3,8,8"), ("--rounding", "nearest")])
def test_nothing_is_rounded_where_nothing_is_evaluated(mpq: Mpq, command: str, words: tuple[str, ...]) -> None:
    ran = mpq(command, NET, *words)
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    option = words[0].removeprefix("--")
    assert f"{option}: is for models that are evaluated; add --eval package.module:function" in ran.err
