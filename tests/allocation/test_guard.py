"""The guard: is a plan predicted to be worse than uniform widths of its own true size?"""

import itertools
import math
import warnings

import numpy as np
import pytest

from mpq_plugins import (
    Affine,
    Budget,
    LayerStats,
    LayerTable,
    MixQuant,
    Plan,
    PlanWarning,
    SettingError,
    Uniform,
    compare,
)
from mpq_plugins.allocation.contract import Widths
from mpq_plugins.allocation.guard import Comparison
from mpq_plugins.allocation.make import make_plan
from mpq_plugins.allocation.objective import predicted
from mpq_plugins.plans.scheme import Scheme
from tests.helpers.says import naming
from tests.helpers.synthetic_tables import synthetic_table

BITS = tuple(range(2, 9))
PER_CHANNEL = Affine(granularity="per_channel")


def layer(name: str, mse: float, kl: float | None = None, channels: int = 4, per: int = 50) -> LayerStats:
    """A linear layer whose errors fall by four a bit; each channel twice as bad as the one before."""
    curve = np.array([mse * 4.0**-b for b in BITS])
    shares = 2.0 ** np.arange(channels)
    return LayerStats(
        name, "linear", (channels, per), 0, 1.0, np.ones(channels),
        {"mse": curve, "relative": np.sqrt(curve)},
        {"mse": np.outer(curve, shares / shares.mean()), "relative": np.outer(np.sqrt(curve), np.ones(channels))},
        {} if kl is None else {"kl": np.array([kl * 4.0**-b for b in BITS])},
    )  # fmt: skip


def table(*layers: LayerStats, scheme: Scheme = PER_CHANNEL) -> LayerTable:
    return LayerTable(layers, scheme, BITS, ("relative", "mse"), False, "sha256:test")


def by_hand(measured: LayerTable, **bits: Widths) -> Plan:
    return make_plan(measured, Uniform(), bits)


SENSITIVE, TOUGH = layer("a", mse=100.0), layer("b", mse=0.01)


def test_a_plan_the_wrong_way_round_is_worse_than_uniform_and_says_so() -> None:
    measured = table(SENSITIVE, TOUGH)
    with pytest.warns(PlanWarning, match=naming("worse", "uniform", "mse")):
        plan = by_hand(measured, a=3, b=5)
    found = compare(measured, plan)
    assert found is not None
    assert found.worse
    assert found.best is not None
    assert found.uniform is not None
    assert found.best < found.uniform < found.plan
    assert f"{found.plan:.4g}" in found.text()


@pytest.mark.parametrize(("plan", "worse"), [(1.0, False), (1.0005, False), (1.002, True), (1.05, True)])
def test_a_prediction_is_worse_from_a_thousandth_on(plan: float, worse: bool) -> None:
    found = Comparison("mse", 100, 4.0, plan, uniform=1.0, best=1.0)
    assert found.beaten == found.worse == worse


def test_a_plan_the_right_way_round_is_not_worse_and_silent() -> None:
    measured = table(SENSITIVE, TOUGH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = by_hand(measured, a=5, b=3)
    found = compare(measured, plan)
    assert found is not None
    assert not found.worse


@pytest.mark.parametrize("bits", BITS)
def test_a_uniform_plan_is_exactly_what_it_is_compared_with(bits: int) -> None:
    measured = table(SENSITIVE, TOUGH)
    found = compare(measured, Uniform(bits=bits)(measured))
    assert found is not None
    assert found.uniform == pytest.approx(found.plan, rel=1e-12)
    assert not found.worse


def test_between_two_widths_the_logarithm_is_interpolated_by_true_size() -> None:
    measured = table(SENSITIVE, TOUGH)
    plan = by_hand(measured, a=4, b=3)
    found = compare(measured, plan)
    three, four = (Uniform(bits=b)(measured).size().total_bits for b in (3, 4))
    share = (plan.size().total_bits - three) / (four - three)
    costs = [200 * 4.0**-b * 100.01 for b in (3, 4)]
    assert found is not None
    assert found.uniform == pytest.approx(math.exp((1 - share) * math.log(costs[0]) + share * math.log(costs[1])))


def test_budget_is_never_worse_on_what_it_keeps_low() -> None:
    measured = table(SENSITIVE, TOUGH, layer("c", mse=3.0))
    for average in (2.2, 3.0, 3.7, 5.0):
        for parts in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                plan = Budget(average_bits=average, bits=BITS, parts=parts)(measured)
            found = compare(measured, plan, "mse")
            assert found is not None
            assert not found.worse


def test_the_networks_own_output_is_chosen_over_weight_errors() -> None:
    """What looks best by weight error is flagged where the table knows that the output says the opposite."""
    measured = table(layer("a", mse=100.0, kl=0.001), layer("b", mse=0.01, kl=10.0))
    with pytest.warns(PlanWarning, match="predicted kl at"):
        plan = Budget(average_bits=4.0, bits=BITS, parts=False)(measured)
    found = compare(measured, plan)
    assert found is not None
    assert (found.sensitivity, found.worse) == ("kl", True)
    by_error = compare(measured, plan, "mse")
    assert by_error is not None
    assert not by_error.worse


def test_parts_are_split_by_what_has_numbers_per_channel() -> None:
    measured = table(layer("a", mse=100.0, kl=0.1), layer("b", mse=0.01, kl=0.1))
    plan = by_hand(measured, a=[3, 3, 5, 5], b=4)
    found = compare(measured, plan)
    assert found is not None
    assert found.sensitivity == "kl*mse"


def test_what_the_table_cannot_tell_is_none() -> None:
    measured = table(SENSITIVE, TOUGH)
    other = table(SENSITIVE, TOUGH, scheme=Affine(granularity="per_tensor"))
    assert compare(other, by_hand(measured, a=3, b=3)) is None  # another scheme
    assert compare(other, by_hand(other, a=[3, 3, 4, 4], b=3)) is None  # a scale a part
    assert compare(table(SENSITIVE), by_hand(measured, a=3, b=3)) is None  # other layers


def test_below_the_smallest_uniform_plan_there_is_none_to_compare_with() -> None:
    bare = table(SENSITIVE, layer("b", mse=0.01))
    plan = by_hand(bare, a=2, b=2)
    smallest = compare(bare, plan)
    assert smallest is not None
    assert smallest.uniform == pytest.approx(smallest.plan)
    floats = by_hand(bare, a=2, b=32)
    found = compare(bare, floats)
    assert found is not None
    assert found.worse  # 17 bits a weight: uniform 8 is far better


def test_a_sensitivity_that_was_not_measured_is_refused() -> None:
    measured = table(SENSITIVE, TOUGH)
    with pytest.raises(SettingError, match=naming("'kl'", "relative", "mse")):
        compare(measured, Uniform(bits=4)(measured), "kl")


def test_mixquant_far_out_is_flagged() -> None:
    """A relative error that has saturated lets a large QEM send the sensitive layer to two bits."""
    curve = np.minimum(1.0, np.array([4.0 * 2.0**-b for b in BITS]))
    saturated = LayerStats(
        "a", "linear", (4, 50), 0, 1.0, np.ones(4),
        {"mse": np.array([100 * 4.0**-b for b in BITS]), "relative": np.full(7, 1.0)},
    )  # fmt: skip
    fine = LayerStats(
        "b", "linear", (4, 50), 0, 1.0, np.ones(4), {"mse": np.array([4.0**-b for b in BITS]), "relative": curve}
    )
    measured = LayerTable((saturated, fine), PER_CHANNEL, BITS, ("relative", "mse"), False, "sha256:test")
    with pytest.warns(PlanWarning, match="this mixquant plan"):
        MixQuant(qem=2.0)(measured)


def test_the_best_width_for_each_layer_is_the_best_there_is() -> None:
    """Against every combination of widths, on layers of sizes that fit into one another badly."""
    sizes = ((3, 17), (5, 40), (4, 90))
    measured = table(*(
        layer(name, mse=10.0**k, channels=channels, per=per)
        for k, (name, (channels, per)) in enumerate(zip("abc", sizes, strict=True))
    ))  # fmt: skip
    others = [
        by_hand_quietly(measured, dict(zip("abc", widths, strict=True))) for widths in itertools.product(BITS, repeat=3)
    ]
    priced = [(other.size().total_bits, predicted(measured, other, "mse") or 0.0) for other in others]
    for average in (2.5, 3.1, 4.3, 5.2):
        plan = Budget(average_bits=average, parts=False, bits=BITS)(measured)
        found = compare(measured, plan, "mse")
        assert found is not None
        assert found.best is not None
        least = min(cost for bits, cost in priced if bits <= found.total_bits)
        assert found.best == pytest.approx(least, rel=1e-9)
        assert found.best <= found.plan * (1 + 1e-9)


def by_hand_quietly(measured: LayerTable, bits: dict[str, int]) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)
        return make_plan(measured, Uniform(), bits)


def test_nothing_is_compared_where_the_warning_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def noted(table: LayerTable, plan: Plan, sensitivity: str | None) -> None:
        compared.append(plan.allocator.name)

    monkeypatch.setattr("mpq_plugins.allocation.guard._beside_uniform", noted)
    table = synthetic_table([("a", (8, 8))])
    for action, wanted in (("ignore", []), ("always", ["uniform"]), ("error", ["uniform"])):
        with warnings.catch_warnings():
            warnings.simplefilter(action, PlanWarning)  # type: ignore[arg-type]
            Uniform(bits=4)(table)
        assert compared == wanted
        compared.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="another", category=PlanWarning)
        Uniform(bits=4)(table)
    assert compared == ["uniform"]
