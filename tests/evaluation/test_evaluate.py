"""Plans tried on a model: rows against runs by hand with `apply`, whatever the rounding, and the command."""

import copy
import csv
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpq_plugins as mpq
from mpq_plugins.errors import MismatchError, SettingError, SourceError
from mpq_plugins.evaluation.scored import evaluation_facts
from mpq_plugins.reconstruction.rounding import Rounding
from tests.conftest import Ran
from tests.helpers.nets import conv_net, tied_net

Mpq = Callable[..., Ran]
HERE = "tests.evaluation.test_evaluate"
stop_at = -1
calls = 0


def net() -> nn.Module:
    return conv_net()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2)]


def score(model: nn.Module) -> dict[str, float]:
    global calls
    if calls == stop_at:
        raise KeyboardInterrupt
    calls += 1
    with torch.no_grad():
        return {"sum": float(model(batches()[0]).sum()), "largest": float(model(batches()[0]).max())}


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{HERE}.calls", 0)
    monkeypatch.setattr(f"{HERE}.stop_at", -1)


def plans() -> dict[str, mpq.Plan]:
    table = mpq.measure(conv_net(), mpq.Affine(granularity="per_channel"))
    return {f"{bits}.json": mpq.Uniform(bits=bits)(table) for bits in (2, 4)}


@pytest.mark.parametrize(
    ("rounding", "label"),
    [(None, "compensated"), ("compensated", "compensated"), ("nearest", "nearest, corrected")],
)
def test_rows_are_what_running_by_hand_gives(rounding: Rounding | None, label: str) -> None:
    model, given = conv_net(), plans()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = mpq.evaluate(model, given, score, calibrate=batches(), rounding=rounding)
    wanted: list[tuple[str, str, bool, nn.Module]] = [("float", "", False, model)]
    for name, plan in given.items():
        wanted.append((name, "nearest", False, mpq.apply(model, plan)))
        wanted.append((name, label, True, mpq.apply(model, plan, calibrate=batches(), rounding=rounding)))
    assert [(row.name, row.rounding, row.corrected, dict(row.scores)) for row in rows] == [
        (name, called, corrected, score(tried)) for name, called, corrected, tried in wanted
    ]
    assert rows[0].size is None
    assert [row.size for row in rows[1::2]] == [plan.size() for plan in given.values()]
    assert all(row.seconds > 0 for row in rows)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_progress_names_the_plan_and_its_rounding() -> None:
    said: list[str] = []
    mpq.evaluate(conv_net(), plans(), score, calibrate=batches(), progress=lambda name, *_: said.append(name))
    assert said == ["float", *(f"{name}, {how}" for name in plans() for how in ("nearest", "compensated")), ""]


def test_rows_of_another_rounding_are_not_taken_for_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = conv_net(), plans()
    monkeypatch.setattr(f"{HERE}.stop_at", 4)  # after float, a plan to nearest, the same compensated, and the next

    def run(rounding: Rounding | None) -> Any:
        return mpq.evaluate(
            model, given, score, calibrate=batches(), rounding=rounding, store=tmp_path / "rows.partial"
        )

    with pytest.raises(KeyboardInterrupt):
        run(None)
    monkeypatch.setattr(f"{HERE}.stop_at", -1)
    with pytest.raises(SettingError, match=r"another job finished \(it differs in rounding\)"):
        run("nearest")
    monkeypatch.setattr(f"{HERE}.calls", 0)
    assert [row.rounding for row in run("compensated")] == ["", *["nearest", "compensated"] * 2]
    assert calls == 1


def test_rows_from_before_there_was_a_choice_are_refused(tmp_path: Path) -> None:
    facts = evaluation_facts(conv_net(), score, batches(), "nearest")
    before = {name: value for name, value in facts.items() if name != "rounding"}
    with mpq.Store(tmp_path / "rows.partial") as store:
        store.job("sweep", before).add_row("a plan", {"score": 1})
        with pytest.raises(SettingError, match="differs in rounding"):
            store.job("sweep", facts)


@dataclass
class Scorer:
    """An evaluation that is an object."""

    data: Any

    def __call__(self, model: Any) -> float:
        return float(torch.as_tensor(self.data).sum())


def on(data: Any) -> Callable[[Any], float]:
    """An evaluation that has its data from outside."""
    return lambda _: float(torch.as_tensor(data).sum())


BOUND: dict[str, Callable[[Any], Any]] = {
    "object": Scorer, "method": lambda data: Scorer(data).__call__, "closure": on,
    "partial": lambda data: functools.partial(on(0), data),
    "partial of a closure": lambda data: functools.partial(on(data)),
}  # fmt: skip


@pytest.mark.parametrize("bound", BOUND.values(), ids=BOUND)
def test_rows_of_an_evaluation_on_other_data_are_not_taken_for_its_own(bound: Any) -> None:
    """Whatever way the data come to it; plain values and tensors say the same in another process."""
    data: list[Any] = [torch.ones(2), torch.zeros(2), torch.ones(1, 2), torch.ones(2).numpy()]
    if bound not in (BOUND["object"], BOUND["method"]):  # whose plain values may count calls
        data += [1, 2, 2.5, "1", [torch.ones(2)], None, Path("1")]
    facts = [evaluation_facts(conv_net(), bound(one))["evaluation"] for one in data]
    assert len({*facts}) == len(data)
    again = [evaluation_facts(conv_net(), bound(copy.deepcopy(one)))["evaluation"] for one in data]
    assert again == facts


def test_an_evaluation_that_holds_itself_or_what_cannot_be_compared_is_told_by_its_source() -> None:
    holder: dict[str, Any] = {}

    def calls_itself(model: Any) -> float:
        return 0.0 if holder else calls_itself(model)

    holder["self"] = calls_itself
    facts = [evaluation_facts(conv_net(), evaluation)["evaluation"] for evaluation in (calls_itself, on(object()))]
    assert len({*facts}) == 2
    assert evaluation_facts(conv_net(), on(object()))["evaluation"] == facts[1]


def test_what_decides_a_score_tells_roundings_apart() -> None:
    words: tuple[Rounding, ...] = ("nearest", "compensated", "learned")
    facts = [evaluation_facts(conv_net(), score, batches(), word) for word in words]
    facts.append(evaluation_facts(conv_net(), score))
    assert len({json.dumps(one) for one in facts}) == 4
    assert evaluation_facts(conv_net(), score, batches()) == facts[1]
    assert evaluation_facts(conv_net(), score, None, "nearest") == facts[3]


def test_a_rounding_that_needs_inputs_is_refused_before_the_first_evaluation() -> None:
    for bad, said in (("compensated", "needs calibration inputs"), ("best", "nearest, compensated, learned")):
        given: Any = bad
        with pytest.raises(SettingError, match=said):
            mpq.evaluate(conv_net(), plans(), score, rounding=given)
    assert calls == 0


def test_bad_input_is_refused() -> None:
    with pytest.raises(SettingError, match="plans: none given"):
        mpq.evaluate(conv_net(), {}, score)
    with pytest.raises(MismatchError):
        mpq.evaluate(tied_net(), plans(), lambda _: 1.0)
    bad: list[Any] = [lambda _: float("nan"), lambda _: {}, lambda _: "word", lambda _: 1 / 0]
    for each in bad:
        with pytest.raises(SourceError, match="<lambda>"):
            mpq.evaluate(conv_net(), plans(), each)


def test_names_that_vary_or_are_the_tables_own_are_refused() -> None:
    names = iter("abc")
    with pytest.raises(SourceError, match="returned a for one model and b for another"):
        mpq.evaluate(conv_net(), plans(), lambda _: {next(names): 1.0})
    with pytest.raises(SettingError, match="returns 'evaluation seconds', which the table has already"):
        mpq.evaluate(conv_net(), plans(), lambda _: {"evaluation seconds": 1.0})


def test_a_fault_names_the_line_of_the_users_own_file() -> None:
    with pytest.raises(SourceError, match=r"test_evaluate\.py, line \d+"):
        mpq.evaluate(conv_net(), plans(), lambda model: float(model(torch.ones(1)).sum()))


def saved(folder: Path) -> list[Path]:
    for name, plan in plans().items():
        plan.save(folder / name)
    return [folder / name for name in plans()]


def test_the_command_shows_every_row_and_writes_it(mpq: Mpq, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    words = ("evaluate", f"{HERE}:net", *saved(tmp_path), "--eval", f"{HERE}:score")
    ran = mpq(*words, "--calibrate", f"{HERE}:batches", "-o", out)
    assert ran.code == 0, ran.err
    with out.open() as file:
        rows = list(csv.DictReader(file))
    how = [("nearest", "False"), ("compensated", "True")]
    assert [(row["plan"], row["rounding"], row["corrected"]) for row in rows] == [
        ("float", "", "False"), *(("2.json", *one) for one in how), *(("4.json", *one) for one in how)
    ]  # fmt: skip
    for row in rows:
        assert f"{float(row['score_sum']):.4g}" in ran.out
        assert re.search(rf"│ {row['plan']} +│ {row['rounding']} ", ran.out)
    document = json.loads(mpq(*words, "--json").out)
    assert [row["plan"] for row in document["rows"]] == ["float", "2.json", "4.json"]
    assert [row["scores"]["sum"] for row in document["rows"]] == [
        float(row["score_sum"]) for row in rows if row["corrected"] == "False"
    ]


def test_a_checkpoint_is_evaluated_with_its_own_weights(mpq: Mpq, tmp_path: Path) -> None:
    trained = conv_net()
    with torch.no_grad():
        trained.fc.bias.add_(1)
    torch.save(trained.state_dict(), tmp_path / "net.pt")
    plan = saved(tmp_path)[1]
    words = ("evaluate", tmp_path / "net.pt", plan, "--eval", f"{HERE}:score", "--json")
    ran = mpq(*words, "--model", f"{HERE}:net")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["rows"][0]["scores"] == score(trained.eval())
    refused = mpq(*words)
    assert refused.code == 2
    assert "only a module can be run; add --model package.module:factory" in refused.err


def test_an_interrupted_run_goes_on(mpq: Mpq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.csv"
    words = ("evaluate", f"{HERE}:net", *saved(tmp_path), "--eval", f"{HERE}:score", "-o", out)
    monkeypatch.setattr(f"{HERE}.stop_at", 2)
    stopped = mpq(*words)
    assert stopped.code == 130
    assert not out.exists()
    monkeypatch.setattr(f"{HERE}.stop_at", -1)
    monkeypatch.setattr(f"{HERE}.calls", 0)
    assert mpq(*words).code == 0
    assert calls == 1
    assert out.is_file()
    assert not out.with_name("rows.csv.partial").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--calibrate", f"{HERE}:batches", "--synthetic", "4,3,8,8"), "give one"),
        (("--model", f"{HERE}:net"), "SOURCE is a module"),
        (("--eval", "none:score"), "the function cannot be found"),
    ],
)
def test_what_contradicts_itself_is_one_line(mpq: Mpq, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    ran = mpq("evaluate", f"{HERE}:net", saved(tmp_path)[0], "--eval", f"{HERE}:score", *words)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert len([line for line in ran.err.splitlines() if not line.startswith("mpq: note")]) == 1


def test_a_plan_that_is_given_twice_is_refused(mpq: Mpq, tmp_path: Path) -> None:
    plan = saved(tmp_path)[0]
    ran = mpq("evaluate", f"{HERE}:net", plan, plan, "--eval", f"{HERE}:score")
    assert ran.code == 2
    assert "is given twice" in ran.err
