"""The order of trials, the criterion, and what is said where none meets it."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import MixQuant, SettingError, TuningError, Uniform, measure
from mpq_plugins.evaluation.tuning import Criterion, Tuning, plan_text, smallest_first
from tests.helpers.nets import conv_net
from tests.helpers.says import naming

TABLE = measure(conv_net(), bits=range(1, 9))


def test_smallest_first_whatever_the_order() -> None:
    plans = [Uniform(bits=b)(TABLE) for b in (5, 2, 8, 3)]
    assert [plan.layers[0].bits for plan in smallest_first(plans)] == [2, 3, 5, 8]


def test_plans_that_say_the_same_are_one_trial_the_first() -> None:
    same = [MixQuant(qem=1e-9)(TABLE), Uniform(bits=8)(TABLE), MixQuant(qem=2e-9)(TABLE)]
    assert smallest_first(same) == same[:1]


def test_no_plans_are_an_error() -> None:
    with pytest.raises(SettingError, match="one or more"):
        smallest_first([])


@given(st.floats(1e-3, 1e3), st.floats(0, 0.5), st.floats(0, 2e3))
def test_a_share_of_the_baseline(baseline: float, loss: float, score: float) -> None:
    assert Criterion(loss).met(score, baseline) == (score >= baseline * (1 - loss))
    lower = Criterion(loss, higher_is_better=False)
    assert lower.met(score, baseline) == (score <= baseline * (1 + loss))


def test_an_absolute_loss_takes_any_baseline() -> None:
    criterion = Criterion(0.5, absolute=True)
    assert criterion.met(-2.5, -2.0)
    assert not criterion.met(-2.51, -2.0)
    assert "at least -2.5 (float -2, tolerable loss 0.5)" in criterion.text(-2.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, "1%", None, True])
def test_a_loss_that_is_no_number(loss: Any) -> None:
    with pytest.raises(SettingError, match="tolerable_loss"):
        Criterion(loss)


@pytest.mark.parametrize("baseline", [0.0, -1.0, math.inf])
def test_a_share_of_nothing_is_no_criterion(baseline: float) -> None:
    with pytest.raises(SettingError, match="score above 0"):
        Criterion(0.01).bound(baseline)


def test_the_smallest_that_meets_the_criterion_is_chosen() -> None:
    tuning = Tuning(100.0, Criterion(0.01))
    for bits, score in ((2, 50.0), (5, 99.5), (4, 99.0), (8, 100.0)):
        tuning = tuning.with_trial(Uniform(bits=bits)(TABLE), score)
    assert [trial.met for trial in tuning.trials] == [False, True, True, True]
    assert tuning.chosen.plan.layers[0].bits == 4


@pytest.mark.parametrize(("higher", "best"), [(True, 90.0), (False, 50.0)])
def test_none_good_enough_names_the_best(higher: bool, best: float) -> None:
    tuning = Tuning(100.0 if higher else 1.0, Criterion(0.01, higher_is_better=higher))
    for bits, score in ((2, 50.0), (3, 90.0)):
        tuning = tuning.with_trial(Uniform(bits=bits)(TABLE), score)
    with pytest.raises(TuningError, match=naming(2, "1%", "uniform", f"{best:g}")):
        _ = tuning.chosen


def test_no_trial_at_all() -> None:
    with pytest.raises(TuningError, match="no trial was run"):
        _ = Tuning(1.0, Criterion(0.01)).chosen


def test_a_plan_in_words() -> None:
    plan = MixQuant(qem=3.0)(TABLE)
    assert plan_text(plan) == f"mixquant qem=3.0, {plan.size().total_average_bits:.3f} bits a weight"
