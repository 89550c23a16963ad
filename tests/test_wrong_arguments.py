"""What is no model, plan, table, path or list: every public function says so in an error of ours that names it."""

import inspect
import types
from collections import defaultdict
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpq_plugins as mpq
from mpq_plugins.errors import MPQError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def score(model: nn.Module) -> float:
    return float(model(BATCHES[0]).detach().sum())


NET = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
NORMED = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
TABLE = mpq.measure(NET, per_channel=True)
PLAN = mpq.Uniform(bits=4)(TABLE)
CODED = mpq.measure(NET, mpq.EntropyCoded())
BATCHES = [torch.randn(64, 8, generator=torch.Generator().manual_seed(0))]
NOWHERE = Path("/dev/null/nothing")  # which root cannot make either
CHIP = mpq.Capabilities(backend="chip", bits=(4, 8), kinds=("linear",))

PROGRESS = {"progress": None}
SELECTED = {"skip": (), "only": ()}
ON_INPUTS = {"model": NET, "plan": PLAN, "batches": BATCHES, **PROGRESS}
MEASURED = {"metrics": ("mse",), **SELECTED, "executor": None, "store": None, **PROGRESS}
CALLS: Mapping[str, Mapping[str, Any]] = {
    "apply": {"model": NET, "plan": PLAN, "calibrate": BATCHES, "rounding": "nearest"},
    "calibrate_inputs": ON_INPUTS,
    "compare": {"table": TABLE, "plan": PLAN, "sensitivity": "mse"},
    "compensate": {**ON_INPUTS, "columns": 64, "seed": 0, "executor": None, "store": None, "finished": None},
    "compress": {"source": NET, "plan": PLAN, "path": "net.mpq", "coding": "packed", "prune": None, **PROGRESS},
    "correct": {**ON_INPUTS, "shrinkage": 1.0},
    "decompress": {"path": "there.mpq", **PROGRESS},
    "evaluate": {
        "model": NET, "plans": {"a": PLAN}, "score": score, "calibrate": BATCHES, "rounding": "nearest", "store": None,
        "executor": None, **PROGRESS,
    },
    "find_weights": {"source": NET, **SELECTED},
    "finish": {"model": NET},
    "fit_file": {"source": NET, "plan": mpq.Budget(file_size=9000)(CODED), "batches": BATCHES, **PROGRESS},
    "import_autoround": {"path": NOWHERE, "table": TABLE, "skip": ()},
    "import_imatrix": {"path": NOWHERE, "table": TABLE, "source": NET, "skip": (), **PROGRESS},
    "import_modelopt": {"path": NOWHERE, "table": TABLE, "skip": ()},
    "import_olive": {"path": NOWHERE, "source": NET, "skip": ()},
    "input_ranges": {"source": NET},
    "iter_weights": {"source": NET},
    "legalise": {"plan": PLAN, "capabilities": CHIP, "policy": "up"},
    "make_plan": {"table": TABLE, "allocator": mpq.Uniform(bits=4), "bits": {"0": 4, "2": 4}},
    "measure": {"source": NET, "scheme": mpq.Affine(), "bits": (4, 8), "cache": None, "fold_bn": "auto", **MEASURED},
    "measure_activations": {
        "model": NET, "table": TABLE, "batches": BATCHES, "bits": (8,), "activations": mpq.Activations(8),
        "sensitivities": ("output_mse",), "executor": None, "store": None, **PROGRESS,
    },
    "measure_types": {"source": NET, "types": ("int4",), **MEASURED},
    "named_type": {"name": "int4"},
    "pareto": {"table": TABLE, "budgets": (4,), "sensitivity": "mse", "bits": (2, 4), "file_bits": (), "coded": None},
    "prune": {"model": NET, "pruning": mpq.Sparsity(0.5), **SELECTED},
    "reconstruct": {**ON_INPUTS, "steps": 1, "batch_size": 8, "blocks": (), "store": None, "finished": None},
    "round_weights": {**ON_INPUTS, "rounding": "nearest", "executor": None},
    "sensitivity": {
        "model": NET, "table": TABLE, "kind": "kl", "batches": BATCHES, "executor": None, "store": None, "seed": 0,
        **PROGRESS,
    },
    "share": {"model": NET, "plan": PLAN},
    "sweep": {
        "table": TABLE, "plans": [PLAN], "model": NET, "evaluate": score, "series": (), "judge": None,
        "calibrate": BATCHES, "executor": None, "store": None, **PROGRESS,
    },
    "synthetic_batches": {"model": NORMED, "shape": (4, 8), "count": 1, "steps": 1, **PROGRESS},
    "verify": {"model": mpq.apply(NET, PLAN), "plan": PLAN, "original": None},
    "with_input_ranges": {"model": NET, "ranges": {}},
    "without_input_ranges": {"model": NET},
}  # fmt: skip
WRONG = {
    "an integer": 3, "a fraction": 0.5, "none": None, "a module": NET, "a plan": PLAN, "a table": TABLE,
    "a table of types": mpq.measure_types(NET, ("int4", "int8")), "a class": nn.Linear, "a list": [3],
    "a mapping": {"a": 3}, "a text": "nothing of the sort", "an object": object(), "a path": NOWHERE,
    "a tensor": torch.ones(2),
}  # fmt: skip
CALLBACKS = ("progress", "finished")
NEVER = ("an object", "an integer", "a fraction")  # most arguments are never one
CALLED = {("named_type", "name"): "type"}  # as on the command line
READ_FIRST = ("import_autoround", "import_imatrix", "import_modelopt", "import_olive")  # of a file that is not there
MAKERS: Mapping[str, Any] = {
    "budget": mpq.Budget(average_bits=4), "mixquant": mpq.MixQuant(qem=2), "ptilmpq": mpq.PTILMPQ(),
    "sqnr": mpq.SQNR(average_bits=4), "uniform": mpq.Uniform(bits=4),
}  # fmt: skip


def test_every_function_is_tried() -> None:
    public = {name for name in dir(mpq) if isinstance(getattr(mpq, name), types.FunctionType)}
    assert public == set(CALLS)


@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name in CALLS for argument in CALLS[name]])
def test_another_kind_of_value_is_an_error_that_names_the_argument(
    name: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a text is taken for the path of a file
    mpq.compress(NET, PLAN, "there.mpq")
    before = {key: value.clone() for key, value in NET.state_dict().items()}
    required = inspect.signature(getattr(mpq, name)).parameters[argument].default is inspect.Parameter.empty
    refused = 0
    for kind, value in WRONG.items():
        if argument in CALLBACKS and callable(value):
            continue  # what it raises when it is called is its own
        try:
            made = getattr(mpq, name)(**{**CALLS[name], argument: value})
            list(made) if inspect.isgenerator(made) else made
        except MPQError as error:
            refused += 1
            said = str(error)
            assert "\n" not in said
            named = said.startswith(CALLED.get((name, argument), argument))
            assert named or kind not in NEVER or name in READ_FIRST, said
        except Exception as error:
            raise AssertionError(f"{name}({argument}={kind}): {type(error).__name__}: {error}") from error
    assert refused >= (len(WRONG) - 3 if required else 1)
    assert all(torch.equal(value, before[key]) for key, value in NET.state_dict().items())


@pytest.mark.parametrize("allocator", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("kind", WRONG)
def test_an_allocator_is_given_a_table(allocator: Any, kind: str) -> None:
    if kind.startswith("a table"):
        return
    with pytest.raises(MPQError, match=r"table: is a .*, no LayerTable"):
        allocator(WRONG[kind])


@pytest.mark.parametrize("kind", [mpq.Plan, mpq.LayerTable, mpq.TypeTable])
@pytest.mark.parametrize("value", [3, None, NET, [3], {"a": 3}, 0.5], ids=lambda value: type(value).__name__)
def test_a_file_is_read_from_a_path(kind: Any, value: object) -> None:
    with pytest.raises(MPQError, match="path"):
        kind.load(value)


@pytest.mark.parametrize("made", [PLAN, TABLE], ids=["plan", "table"])
@pytest.mark.parametrize("value", [3, None, NET, [3], {"a": 3}, 0.5], ids=lambda value: type(value).__name__)
def test_a_file_is_written_to_a_path(made: Any, value: object) -> None:
    with pytest.raises(MPQError, match="path"):
        made.save(value)


def test_what_is_given_instead_is_told_apart() -> None:
    call: Any = mpq  # without types, as it is called
    cases: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: call.apply(NET, TABLE), "plan: is a LayerTable, no Plan; an allocator makes one of a table"),
        (lambda: call.apply(PLAN, NET), "model: is a Plan, no module"),
        (lambda: call.apply(NET, "plan.json"), "plan: is a str, no Plan; Plan.load it first"),
        (lambda: call.verify(nn.Linear, PLAN), "model: is the class Linear, no module; give one that is made of it"),
        (lambda: call.measure(NET.state_dict()), "source: is a OrderedDict, neither a module nor a path"),
        (lambda: call.measure(NET, skip="fc"), "skip: 'fc' is not allowed; a list of names or patterns"),
        (lambda: call.sensitivity(NET, PLAN, "kl", BATCHES), "table: is a Plan, no LayerTable or TypeTable"),
        (lambda: call.evaluate(NET, PLAN, score), "plans: is a Plan; give a mapping of names to plans"),
        (lambda: call.evaluate(NET, {"a": TABLE}, score), "plans: 'a': is a LayerTable, no Plan"),
        (lambda: call.sweep(TABLE, [PLAN, TABLE]), "plans[1]: is a LayerTable, no Plan"),
    )  # fmt: skip
    for wrong, said in cases:
        with pytest.raises(MPQError) as error:
            wrong()
        assert str(error.value).startswith(said)


def test_widths_may_be_a_mapping_that_has_one_for_whatever_is_asked() -> None:
    widths: Mapping[str, int] = defaultdict(lambda: 4)
    assert mpq.make_plan(TABLE, mpq.Uniform(bits=4), widths) == PLAN
    with pytest.raises(MPQError, match="bits: layer '2' has no width"):
        mpq.make_plan(TABLE, mpq.Uniform(bits=4), {"0": 4})


@pytest.mark.parametrize("call", ["sweep", "evaluate"])
def test_batches_that_come_once_are_every_plans(call: str) -> None:
    def rows(calibrate: Any) -> list[Any]:
        plans = {"a": PLAN, "b": mpq.Uniform(bits=2)(TABLE)}
        if call == "sweep":
            return [row.scores for row in mpq.sweep(TABLE, [*plans.values()], NET, score, calibrate=calibrate)]
        return [row.scores for row in mpq.evaluate(NET, plans, score, calibrate=calibrate)]

    assert rows(batch for batch in BATCHES) == rows(BATCHES)
    with pytest.raises(MPQError, match=r"^calibrate: a single tensor is one batch"):
        rows(BATCHES[0])
    with pytest.raises(MPQError, match=r"^calibrate: none given"):
        rows([])


def test_numbers_of_any_kind_are_numbers() -> None:
    """numpy's, and fractions, which a plan's file and a message can say as well."""
    plans = [row.plan for row in mpq.pareto(TABLE, [3.0, 3.5])]
    for given in (np.array([3.0, 3.5]), np.array([3.0, 3.5], np.float32), [Fraction(3), Fraction(7, 2)]):
        assert [row.plan for row in mpq.pareto(TABLE, given)] == plans  # type: ignore[arg-type]
    assert len(mpq.pareto(TABLE, np.array([3, 4]))) == len(plans)  # type: ignore[arg-type]
    exact = mpq.Budget(size=100, bits=(2, 4), parts=False)(TABLE)
    for size in (np.float32(100), np.int64(100), Fraction(100)):
        assert mpq.Budget(size=size, bits=(2, 4), parts=False)(TABLE) == exact  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", WRONG)
def test_a_plan_is_compared_with_plans_and_renamed_by_a_mapping(kind: str) -> None:
    value: Any = WRONG[kind]
    if kind != "a plan":
        with pytest.raises(MPQError, match=r"^other: is a .*, no Plan"):
            PLAN.diff(value)
    if kind != "a mapping":
        with pytest.raises(MPQError, match=r"^names: is a "):
            PLAN.renamed(value)
    with pytest.raises(MPQError, match=r"^type: "):
        mpq.GGML(type=value)
