"""Sweeps by what files take: rows against files written by hand, and what is fitted, kept, shown and refused."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import Affine, Budget, EntropyCoded, LayerTable, Plan, Uniform
from mpq_plugins.errors import SettingError, SourceError
from mpq_plugins.evaluation.pareto import CODED, pareto
from mpq_plugins.evaluation.sweep import SweepRow, mark_pareto
from mpq_plugins.plans.steps import steps_of, with_steps
from mpq_plugins.report.sweep import sweep_csv, sweep_json, sweep_notes, sweep_table
from tests.conftest import Ran

Mpq = Callable[..., Ran]
HERE = "tests.evaluation.test_files"
SCHEME = Affine(granularity="per_channel", range="mse")
FEW = pytest.mark.filterwarnings("ignore:few inputs:mpq_plugins.RoundingWarning")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(256, 40),
    ).eval()  # fmt: skip


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(32, 3, 8, 8, generator=generator)]


seen: list[dict[str, Tensor]] = []
stop_at = -1


def score(model: nn.Module) -> dict[str, float]:
    """Closeness to the float network; what it is given is noted."""
    if len(seen) == stop_at:
        raise KeyboardInterrupt
    seen.append({name: value.clone() for name, value in model.state_dict().items()})
    with torch.no_grad():
        return {"closeness": -float((model(inputs()[0]) - net()(inputs()[0])).abs().mean())}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{HERE}.stop_at", -1)
    seen.clear()


@pytest.fixture(scope="module")
def table() -> LayerTable:
    return mpq.measure(net(), SCHEME, range(1, 5), per_channel=True)


@pytest.fixture(scope="module")
def coded() -> LayerTable:
    return mpq.measure(net(), EntropyCoded(), (4, 8))


@FEW
@pytest.mark.parametrize("calibrate", [None, inputs()], ids=["nearest", "compensated"])
def test_a_row_has_what_the_file_of_the_evaluated_model_takes(
    table: LayerTable, calibrate: list[Tensor] | None, tmp_path: Path
) -> None:
    plan = Budget(average_bits=2.5, bits=(1, 2, 3, 4))(table)
    exact, found = mpq.sweep(table, [plan], net(), score, calibrate=calibrate, files=True)
    rounded = net() if calibrate is None else mpq.round_weights(net(), plan, calibrate)
    container = mpq.compress(rounded, plan, tmp_path / "net.mpqc")
    assert found.file_bytes == (tmp_path / "net.mpqc").stat().st_size
    others = sum(record.block_bytes for record in container.records.values() if record.parts is None)
    assert found.file_bits == pytest.approx(8 * (container.size - others) / plan.size().numel)
    assert found.total_bytes == plan.size().total_bytes
    state = mpq.decompress(container)
    assert all(value.equal(state[name]) for name, value in seen[1].items())
    stored = sum(value.nbytes for value in net().state_dict().values())
    assert (exact.file_bits, exact.file_bytes) == (32.0, stored)


def test_without_files_rows_have_none_and_stand_by_their_size(table: LayerTable) -> None:
    rows = mpq.sweep(table, [Uniform(bits=2)(table)], net(), score)
    assert [(row.file_bytes, row.file_bits) for row in rows] == [(None, None)] * 2


@pytest.mark.parametrize("given", [{}, {"model": net()}, {"evaluate": score}], ids=["nothing", "model", "evaluate"])
def test_files_of_nothing_that_is_evaluated_are_refused(table: LayerTable, given: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="files: are written of models that are evaluated"):
        mpq.sweep(table, [Uniform(bits=2)(table)], files=True, **given)


def by_hand(size: int, file: int | None, good: float) -> SweepRow:
    bits = None if file is None else float(file)
    return SweepRow("a", {}, 1.0, float(size), size, size, {}, {"score": good}, file_bytes=file, file_bits=bits)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=8))
def test_the_front_is_that_of_the_files(values: list[tuple[int, int, int]]) -> None:
    rows = mark_pareto([by_hand(size, file, good) for size, file, good in values])
    for (_, file, good), row in zip(values, rows, strict=True):
        beaten = any(f <= file and g >= good and (f, g) != (file, good) for _, f, g in values)
        assert row.pareto == (not beaten)
        assert any(other.beats(row) for other in rows) == beaten


def test_where_a_row_has_no_file_all_stand_by_their_size() -> None:
    small, large = by_hand(1, 9, 1.0), by_hand(2, 3, 1.0)
    assert [row.pareto for row in mark_pareto([small, large])] == [False, True]
    mixed = [small, replace(large, file_bytes=None)]
    assert [row.pareto for row in mark_pareto(mixed)] == [True, False]
    assert mixed[0].beats(mixed[1])


@FEW
def test_steps_are_fitted_to_the_file_and_the_row_is_of_the_fitted_plan(
    table: LayerTable, coded: LayerTable, tmp_path: Path
) -> None:
    plan = Budget(file_bits=2.5)(coded)
    _, found = mpq.sweep(table, [plan], net(), score, calibrate=inputs(), files=True)
    fitted = mpq.fit_file(net(), plan, inputs())
    container = mpq.compress(fitted.model, fitted.plan, tmp_path / "net.mpqc")
    assert (found.file_bytes, found.file_bits) == (container.size, container.file_bits)
    assert container.file_bits <= 2.5
    assert found.found == fitted.plan.allocator.found
    assert found.total_bytes == fitted.plan.size().total_bytes != plan.size().total_bytes
    assert found.errors == {"mse": None}  # of another scheme's table
    assert found.rounding == "compensated"
    assert all(value.equal(mpq.decompress(container)[name]) for name, value in seen[1].items())


def test_without_inputs_steps_are_fitted_only_where_files_count(coded: LayerTable) -> None:
    plan = Budget(file_bits=2.5)(coded)
    (_, as_it_is), (_, fitted) = (mpq.sweep(coded, [plan], net(), score, files=files) for files in (False, True))
    assert all(value.equal(mpq.apply(net(), plan).state_dict()[name]) for name, value in seen[1].items())
    assert as_it_is.total_bytes == plan.size().total_bytes
    assert fitted.file_bits is not None
    assert 2.4 < fitted.file_bits <= 2.5


def test_steps_that_are_for_no_file_are_taken_as_they_are(coded: LayerTable) -> None:
    plan = Uniform(bits=8)(coded)
    plan = with_steps(plan, {layer.name: 0.05 for layer in plan.layers}, {layer.name: None for layer in plan.layers})
    (_, found) = mpq.sweep(coded, [plan], net(), score, files=True)
    assert found.file_bits is not None
    assert all(value.equal(mpq.apply(net(), plan).state_dict()[name]) for name, value in seen[1].items())


def test_the_error_of_steps_is_what_they_lose_by_the_tables_ladder(coded: LayerTable) -> None:
    plan = Budget(file_bits=3)(coded)
    (found,) = mpq.sweep(coded, [plan])
    weights = dict(net().named_parameters())
    lost = 0.0
    for name, step in steps_of(plan).items():
        weight = weights[f"{name}.weight"].detach().double()
        codes = weight.sign() * (weight.abs() / step + EntropyCoded().rounding_offset).floor()
        lost += float((weight - codes * step).square().sum())
    error = found.errors["mse"]
    assert error == pytest.approx(lost, rel=0.02)  # between steps the ladder is interpolated
    assert error == pytest.approx(plan.allocator.found["objective"])


@pytest.mark.parametrize("rounding", ["nearest", "learned"])
def test_other_roundings_on_inputs_are_refused_for_files_by_name(coded: LayerTable, rounding: Any) -> None:
    plan = Budget(file_bits=2.5)(coded)
    said = f"rounding: '{rounding}' is not allowed for a file's bytes"
    with pytest.raises(SettingError, match=said):
        mpq.sweep(coded, [Uniform(bits=8)(coded), plan], net(), score, calibrate=inputs(), rounding=rounding)
    with pytest.raises(SettingError, match=said):
        mpq.evaluate(net(), {"plan": plan}, score, calibrate=inputs(), rounding=rounding)
    assert not seen


@FEW
def test_an_evaluated_plan_for_a_file_has_the_size_of_its_fitted_steps(coded: LayerTable) -> None:
    plan = Budget(file_bits=2.5)(coded)
    _, nearest, compensated = mpq.evaluate(net(), {"plan": plan}, score, calibrate=inputs())
    assert nearest.size == plan.size()
    assert compensated.size == mpq.fit_file(net(), plan, inputs()).plan.size() != plan.size()


@FEW
def test_an_interrupted_sweep_has_its_files_when_it_goes_on(
    table: LayerTable, coded: LayerTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [Uniform(bits=2)(table), Budget(file_bits=2.5)(coded), Uniform(bits=3)(table)]
    store = tmp_path / "rows.partial"

    def run(files: bool = True) -> tuple[SweepRow, ...]:
        return mpq.sweep(table, plans, net(), score, calibrate=inputs(), files=files, store=store)

    monkeypatch.setattr(f"{HERE}.stop_at", 3)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(f"{HERE}.stop_at", -1)
    with pytest.raises(SettingError, match=r"another job finished \(it differs in files\)"):
        run(files=False)
    resumed = run()
    assert len(seen) == 3 + 1
    assert not store.exists()
    assert resumed == mpq.sweep(table, plans, net(), score, calibrate=inputs(), files=True)


@pytest.mark.parametrize(
    "damaged", [b"", b"[]", b'{"scores": {"closeness": 1}}', b'{"scores": [1], "file": null}', b"[[" * 100_000]
)
def test_what_is_kept_and_is_no_row_is_done_again(table: LayerTable, tmp_path: Path, damaged: bytes) -> None:
    from mpq_plugins.evaluation.scored import evaluation_facts
    from mpq_plugins.evaluation.sweep import JOB

    plan = Uniform(bits=2)(table)
    with mpq.Store(tmp_path / "rows.partial") as store:
        job = store.job(JOB, evaluation_facts(net(), score, files=True))
        mpq.sweep(table, [plan], net(), score, files=True, store=store)
        (key,) = (name for name in job if name != "float")
        job.add(key, damaged)
        again = mpq.sweep(table, [plan], net(), score, files=True, store=store)
    assert len(seen) == 3
    assert again == mpq.sweep(table, [plan], net(), score, files=True)


def test_a_file_that_cannot_be_written_is_said_before_the_evaluation(table: LayerTable) -> None:
    model = net()
    model.register_buffer("strange", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(SourceError, match="strange"):
        mpq.sweep(table, [Uniform(bits=2)(table)], model, score, files=True)
    assert len(seen) == 1  # of the float model


def test_the_entropy_coded_series_is_what_budget_plans_for_each_file(table: LayerTable, coded: LayerTable) -> None:
    made = pareto(table, [2.0], coded=coded, file_bits=(3, 2.5, 3))
    assert made[:-2] == pareto(table, [2.0])
    assert made[-2:] == tuple(mpq.LabelledPlan(CODED, Budget(file_bits=bits)(coded)) for bits in (2.5, 3))


@pytest.mark.parametrize("half", ["coded", "file_bits"])
def test_bits_of_a_file_without_a_table_of_steps_are_refused(table: LayerTable, coded: LayerTable, half: str) -> None:
    given: Any = {"coded": {"coded": coded}, "file_bits": {"file_bits": (2,)}}[half]
    with pytest.raises(SettingError, match="file_bits and coded belong together"):
        pareto(table, [2.0], **given)


def two_rows() -> list[SweepRow]:
    """A uniform plan that is larger in total, but smaller in the file."""
    steps = SweepRow(
        "budget", {"file_bits": 1.5}, 1.0, 1.1, 90, 100, {"mse": None}, {"top": 2.0}, series=CODED, file_bytes=400,
        file_bits=1.497,
    )  # fmt: skip
    uniform = SweepRow(
        "uniform", {"bits": 2}, 2.0, 2.2, 180, 200, {"mse": 1.0}, {"top": 3.0}, series="uniform", file_bytes=300,
        file_bits=1.25,
    )  # fmt: skip
    return list(mark_pareto([steps, uniform]))


def test_with_files_the_table_has_them_for_sizes_and_says_so() -> None:
    rows = two_rows()
    columns = {column.heading: column.cells for column in sweep_table(rows, "").columns}
    assert list(columns) == ["plan", "file bits", "file", "predicted mse", "top", "*"]
    assert columns["plan"] == ("uniform 2", "entropy coded 1.5")
    assert columns["file bits"] == ("1.250", "1.497")
    assert columns["file"] == ("300 B", "400 B")
    assert columns["predicted mse"] == ("1", "-")
    notes = "\n".join(sweep_notes(rows))
    assert "file bits: all but other tensors" in notes
    assert "bits: a weight, in total" not in notes
    assert "1 of 1 entropy coded plans are matched or beaten by a uniform plan no larger" in notes
    assert "- for entropy-coded steps" in notes
    assert "one scale per tensor" not in notes


def test_without_files_the_notes_say_what_the_size_of_coded_plans_is() -> None:
    rows = [replace(row, file_bytes=None, file_bits=None) for row in two_rows()]
    headings = [column.heading for column in sweep_table(rows, "").columns]
    assert headings[1:3] == ["bits", "size"]
    notes = sweep_notes(rows)
    assert any("whose header comes on top" in note for note in notes)
    assert not any("matched or beaten" in note for note in notes)  # uniform is the larger of the two


def test_csv_and_json_have_both_sizes(table: LayerTable, tmp_path: Path) -> None:
    rows = two_rows()
    sweep_csv(rows, tmp_path / "rows.csv")
    written = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    plain = json.loads(json.dumps(sweep_json(rows, table)))["rows"]
    for row, line, one in zip(rows, written, plain, strict=True):
        for name in ("total_bytes", "total_average_bits", "file_bytes", "file_bits"):
            assert float(line[name]) == one[name] == getattr(row, name)


def test_a_picture_of_files_is_over_their_bits(tmp_path: Path) -> None:
    mpl = pytest.importorskip("matplotlib")
    from mpq_plugins.report.sweep_plot import Point, _series, sweep_plot

    rows = two_rows()
    with mpl.rc_context({"svg.fonttype": "none"}):  # letters stay letters
        sweep_plot(rows, tmp_path / "files.svg", "net")
        sweep_plot([replace(row, file_bytes=None, file_bits=None) for row in rows], tmp_path / "sizes.svg", "net")
    texts = [(tmp_path / name).read_text() for name in ("files.svg", "sizes.svg")]
    assert ["bits a weight in the file" in text for text in texts] == [True, False]
    assert ["bits a weight in total" in text for text in texts] == [False, True]
    points: list[Point] = [point for made in _series(rows, "top").values() for point in made]
    assert sorted(point.bits for point in points) == [1.25, 1.497]


@pytest.mark.slow
@FEW
def test_the_command_sets_entropy_coded_files_beside_the_others(mpq: Mpq, tmp_path: Path) -> None:
    words = ("--budgets", 2, "--bits", "1-3", "--file-bits", "2,3", "--eval", f"{HERE}:score")
    files = ("-o", tmp_path / "front.csv", "--plot", tmp_path / "front.svg")
    ran = mpq("pareto", f"{HERE}:net", *words, "--calibrate", f"{HERE}:inputs", *files)
    assert ran.code == 0, ran.err
    assert "entropy coded 3" in ran.out
    rows = list(csv.DictReader((tmp_path / "front.csv").read_text().splitlines()))
    assert all(float(row["file_bytes"]) > 0 for row in rows)
    steps = [row for row in rows if row["series"] == CODED]
    for row, asked in zip(steps, (2, 3), strict=True):
        assert 0.98 * asked < float(row["file_bits"]) <= asked
        assert row["rounding"] == "compensated"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["front.csv", "front.svg"]


@pytest.mark.slow
def test_a_table_is_source_enough_where_the_model_is_named(mpq: Mpq, table: LayerTable, tmp_path: Path) -> None:
    kept = mpq_table(tmp_path, table)
    words = ("--budgets", 2, "--bits", "2-3", "--file-bits", 3, "--eval", f"{HERE}:score", "--json")
    rows = json.loads(mpq("pareto", kept, *words, "--model", f"{HERE}:net").out)["rows"]
    assert [row["file_bits"] <= 3 for row in rows if row["series"] == CODED] == [True]


def mpq_table(folder: Path, table: LayerTable) -> Path:
    table.save(folder / "net.mpqt")
    return folder / "net.mpqt"


def test_the_command_refuses_files_of_nothing_in_one_line(mpq: Mpq) -> None:
    evaluated = ("--eval", f"{HERE}:score")
    for words, said in (
        ((), "add --eval package.module:function"),
        ((*evaluated, "--calibrate", f"{HERE}:inputs", "--rounding", "nearest"), "with inputs it is compensated"),
        (
            (*evaluated, "--sensitivity", "kl"),
            "'kl' is not measured for entropy-coded steps here; leave out --file-bits",
        ),
    ):
        ran = mpq("pareto", f"{HERE}:net", "--file-bits", "2", *words)
        assert (ran.code, len(ran.err.splitlines()[-1:])) == (2, 1), ran.err
        assert said in ran.err
    assert not seen


@pytest.mark.slow
def test_a_sweep_of_files_is_by_their_bytes_and_a_tuners_trials_say_which(mpq: Mpq) -> None:
    ran = mpq("sweep", f"{HERE}:net", "--file-bits", "2,3", "--eval", f"{HERE}:score", "--json")
    rows = json.loads(ran.out)["rows"]
    assert {row["allocator"] for row in rows} == {"float", "budget", "uniform"}
    assert all(row["file_bits"] <= row["parameters"]["file_bits"] for row in rows if row["allocator"] == "budget")
    assert all(row["file_bytes"] for row in rows)


def test_trials_for_files_are_told_apart(coded: LayerTable) -> None:
    from mpq_plugins.evaluation.tuning import plan_label

    plans: list[Plan] = [Budget(file_bits=2.5)(coded), Budget(file_size=5000)(coded)]
    assert [plan_label(plan) for plan in plans] == ["budget file_bits=2.5", "budget file_size=5000"]


def test_evaluate_says_what_the_size_of_a_coded_plan_is(mpq: Mpq, coded: LayerTable, tmp_path: Path) -> None:
    Budget(file_bits=2.5)(coded).save(tmp_path / "coded.json")
    ran = mpq("evaluate", f"{HERE}:net", tmp_path / "coded.json", "--eval", f"{HERE}:score")
    assert ran.code == 0, ran.err
    assert "entropy-coded plans: bits and size are those of their codes in the file" in ran.out
    assert "steps are fitted" not in ran.out
