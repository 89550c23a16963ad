"""The settings of entropy-coded quantization, and what a plan says of it."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import Affine, EntropyCoded, Plan, Scheme, SettingError
from mpq_plugins.plans.scheme_names import scheme_class
from tests.helpers.plans import linear, plan_of

STEP = r"a number from 1\.18e-38 to 1e\+30"


def test_it_is_a_scheme_by_its_name() -> None:
    assert isinstance(EntropyCoded(), Scheme)
    assert scheme_class("entropy_coded") is EntropyCoded


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 0}, f"step: 0 is not allowed; {STEP}"),
        ({"step": -0.1}, f"step: -0.1 is not allowed; {STEP}"),
        ({"step": 1e-40}, f"step: 1e-40 is not allowed; {STEP}"),
        ({"step": 2e30}, r"step: 2e\+30 is not allowed"),
        ({"step": math.nan}, "step: nan is not allowed"),
        ({"step": math.inf}, "step: inf is not allowed"),
        ({"step": True}, "step: True is not allowed"),
        ({"step": "0.1"}, "step: '0.1' is not allowed"),
        ({"rounding_offset": 0.09}, "rounding_offset: 0.09 is not allowed; a number from 0.1 to 0.5"),
        ({"rounding_offset": 0.51}, "rounding_offset: 0.51 is not allowed"),
        ({"rounding_offset": None}, "rounding_offset: None is not allowed"),
        ({"name": "affine"}, "scheme: 'affine' is not allowed; entropy_coded"),
    ],
)
def test_settings_beyond_their_ranges_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=f"^{message}"):
        EntropyCoded(**settings)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    for step in (2.0**-126, 1, 1e30):
        for offset in (0.1, 0.5):
            assert EntropyCoded(step=step, rounding_offset=offset).step == step


@pytest.mark.parametrize("bits", [0, 1, 9, True, 8.0])
def test_other_widths_are_refused(bits: Any) -> None:
    with pytest.raises(SettingError, match=r"bits: .* is not allowed"):
        EntropyCoded().check_bits(bits)


def test_what_sizes_and_budgets_ask() -> None:
    own, by_step = EntropyCoded(), EntropyCoded(step=0.5)
    assert [scheme.scales_per_group for scheme in (own, by_step)] == [1, 0]
    assert [scheme.offset for scheme in (own, by_step)] == [0.5, 0.4]
    for scheme in (own, by_step):
        assert [scheme.levels(bits) for bits in range(2, 9)] == [3, 7, 15, 31, 63, 127, 255]
        assert scheme.as_affine == Affine(symmetric=True, granularity="per_channel")
        assert (scheme.granularity, scheme.group_size, scheme.has_zero(8)) == ("per_channel", None, True)
    assert [str(own), str(by_step)] == ["entropy-coded", "entropy-coded, step 0.5"]


@given(st.floats(1e-30, 1e30), st.integers(2, 8), st.floats(0.1, 0.5))
def test_the_finest_step_is_the_least_whose_code_has_so_many_bits(largest: float, bits: int, offset: float) -> None:
    step, most = EntropyCoded(rounding_offset=offset).finest_step(largest, bits), 2 ** (bits - 1) - 1
    assert math.floor(largest / step + offset) == most
    assert math.floor(largest / (step * (1 - 1e-5)) + offset) == most + 1


def test_the_finest_step_of_nothing_and_of_too_much() -> None:
    assert EntropyCoded().finest_step(0.0) == 0
    assert EntropyCoded().finest_step(math.inf) == math.inf


@given(
    st.none() | st.floats(2.0**-126, 1e30),
    st.floats(0.1, 0.5),
    st.integers(2, 8),
    st.none() | st.integers(0, 1 << 16),
)
def test_a_plan_keeps_it_in_a_file(step: float | None, offset: float, bits: int, coded: int | None) -> None:
    scheme = EntropyCoded(step=step, rounding_offset=offset)
    plan = plan_of(linear("fc", 4, 8, scheme, bits).model_copy(update={"coded_bytes": coded}))
    assert Plan.model_validate_json(plan.to_json()) == plan
    size = plan.size()
    assert size.weights_only_bits == (32 * bits if coded is None else 8 * coded)
    assert size.total_bits - size.weights_only_bits == (0 if step else 4 * 32)


def test_what_a_plan_promises_is_what_it_says() -> None:
    layer = linear("fc", 10, 100, EntropyCoded(step=0.1), 8)
    assert layer.bits_text == "8"
    assert layer.model_copy(update={"coded_bytes": 156}).bits_text == "1.25 coded"
