"""Projecting plans onto backends, against rules written out by hand."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import Affine, EntropyCoded, Piecewise, Plan
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.affine import Symmetry
from mpq_plugins.plans.capabilities import Capabilities, Policy
from mpq_plugins.plans.legalise import legalise, require_legal
from tests.helpers.plans import linear, plan_of, plans
from tests.helpers.says import names, naming

ANYTHING = Capabilities(
    backend="anything", bits=tuple(range(1, 9)), kinds=("linear",),
    schemes=("affine", "piecewise", "codebook", "entropy_coded"), symmetric=(False, True, "full"),
    granularities=("per_tensor", "per_channel", "per_group"), parts=True, float_parts=True, activation_bits=(None, 8),
)  # fmt: skip
INT8 = Capabilities(backend="int8", bits=(8,), kinds=("linear",), granularities=("per_channel",), activation_bits=(8,))
EVEN = Capabilities(backend="even", bits=(2, 4, 8), kinds=("linear",), symmetric=(True,), parts=True)
BACKENDS = [INT8, EVEN, Capabilities(backend="coarse", bits=(4, 8), kinds=("linear",), granularities=("per_tensor",))]
PER_CHANNEL = Affine(granularity="per_channel")


@given(plans, st.sampled_from(BACKENDS), st.sampled_from(["up", "nearest"]))
def test_what_comes_out_is_legal_and_every_difference_is_listed(plan: Plan, able: Capabilities, policy: Policy) -> None:
    legal, changes = legalise(plan, able, policy)
    again, none = legalise(legal, able, policy)
    assert again == legal
    assert none == ()
    require_legal(legal, able)
    assert {change.layer for change in changes} - {"activations"} == {d.name for d in plan.diff(legal)}
    cost = sum(change.cost for change in changes)
    assert legal.size().total_bits - plan.size().total_bits == cost
    assert Plan.model_validate_json(legal.to_json()) == legal
    for layer in legal.layers:
        for part in layer.all_parts:
            assert part.bits in (16, 32) or part.bits in able.bits


@given(plans)
def test_a_backend_that_takes_all_changes_nothing(plan: Plan) -> None:
    for policy in ("up", "nearest", "error"):
        assert legalise(plan, ANYTHING, policy) == (plan, ())


@pytest.mark.parametrize(
    ("given_codes", "able", "expected"),
    [("full", (False, True), True), ("full", (False,), False), ("full", (True, "full"), "full"),
     (True, ("full",), "full"), (True, (False, "full"), "full"), (True, (False,), False),
     (False, (True, "full"), True), (False, ("full",), "full")],
)  # fmt: skip
def test_codes_become_the_nearest_that_the_backend_has(given_codes: Symmetry, able: Any, expected: Symmetry) -> None:
    scheme = Affine(symmetric=given_codes, range="mse", scale_dtype="float16")
    chip = Capabilities(backend="chip", bits=(4,), kinds=("linear",), symmetric=able)
    legal, changes = legalise(plan_of(linear("fc", 4, 2, scheme, 4)), chip)
    assert legal.layers[0].scheme == Affine(symmetric=expected, range="mse", scale_dtype="float16")
    assert [change.why.startswith("chip has only ") for change in changes] == [True] * (expected != given_codes)


@pytest.mark.parametrize(
    ("bits", "policy", "expected"),
    [(3, "up", 4), (5, "up", 8), (1, "up", 2), (8, "up", 8), (3, "nearest", 4), (5, "nearest", 4), (6, "nearest", 8),
     (7, "nearest", 8), (1, "nearest", 2)],
)  # fmt: skip
def test_widths(bits: int, policy: Policy, expected: int) -> None:
    scheme = Affine(symmetric=True)
    legal, changes = legalise(plan_of(linear("fc", 4, 2, scheme, bits)), EVEN, policy)
    assert legal.layers[0].bits == expected
    assert len(changes) == (bits != expected)


def test_parts_become_one_width_and_the_change_says_what_that_costs() -> None:
    plan = plan_of(linear("fc", 100, 50, PER_CHANNEL, {2: tuple(range(75)), 8: tuple(range(75, 100))}))
    legal, (change,) = legalise(plan.with_activation_bits(8), INT8)
    assert legal.layers[0].bits == 8
    assert legal.layers[0].parts is None
    assert change.before == "2x75 8x25 bits, asymmetric per_channel minmax"
    assert change.after == "8 bits, asymmetric per_channel minmax"
    assert "one width per layer" in change.why
    assert change.cost == 75 * 50 * 6 + 75 * 6 - 100  # codes and zero points of 75 channels, less the part map


def test_two_regions_become_an_ordinary_quantizer_of_the_same_size() -> None:
    plan = plan_of(linear("a", 4, 8, Piecewise(granularity="per_channel"), 3),
                   linear("b", 4, 8, Piecewise(granularity="per_channel", storage="shared"), 3))  # fmt: skip
    legal, changes = legalise(plan, Capabilities(backend="x", bits=tuple(range(2, 9)), kinds=("linear",)))
    assert [layer.bits for layer in legal.layers] == [4, 3]
    assert legal.size().weights_only_bits == plan.size().weights_only_bits
    assert all("x has no piecewise scheme" in change.why for change in changes)


CODED = EntropyCoded(step=0.25)
BY_STEP = plan_of(linear("fc", 4, 8, CODED, 8).model_copy(update={"coded_bytes": 5}))


@pytest.mark.parametrize(
    ("able", "expected", "whys"),
    [
        ({}, Affine(symmetric=True), ["no entropy_coded scheme", "no per_channel scales"]),
        ({"granularities": ("per_channel",)}, Affine(symmetric=True, granularity="per_channel"), ["no entropy_coded"]),
        ({"schemes": ("affine", "entropy_coded")}, Affine(symmetric=True), ["no per_channel scales, only per_tensor"]),
        ({"symmetric": (False,)}, Affine(), ["no entropy_coded", "only asymmetric scales", "no per_channel scales"]),
    ],
    ids=repr,
)
def test_a_step_becomes_the_backends_own_scales_and_its_promise_is_gone(
    able: dict[str, Any], expected: Affine, whys: list[str]
) -> None:
    settings = {"backend": "x", "bits": (8,), "kinds": ("linear",), "granularities": ("per_tensor",)} | able
    legal, (change,) = legalise(BY_STEP, Capabilities(**settings))
    (layer,) = legal.layers
    assert (layer.scheme, layer.bits, layer.coded_bytes) == (expected, 8, None)
    assert (change.before, change.after) == ("1.25 coded bits, entropy-coded, step 0.25", f"8 bits, {expected}")
    assert [why in change.why for why in whys] == [True] * len(whys)
    scales = 4 if expected.granularity == "per_channel" else 1
    assert change.cost == 32 * 8 - 5 * 8 + scales * (32 + 8 * (not expected.symmetric))


@pytest.mark.parametrize(
    ("able", "bits"),
    [({"kinds": ("conv2d",)}, 32), ({"bits": (4,)}, 4)],
)
def test_no_promise_is_kept_at_another_width(able: dict[str, Any], bits: int) -> None:
    settings = {"backend": "x", "bits": (8,), "kinds": ("linear",), "schemes": ("entropy_coded",)} | able
    legal, (change,) = legalise(BY_STEP, Capabilities(**settings), "nearest")
    assert (legal.layers[0].bits, legal.layers[0].coded_bytes) == (bits, None)
    scales = 4 * 32 if bits < 8 else 0  # found anew, for the step is too fine for the width
    assert change.cost == 32 * bits + scales - 5 * 8


def test_a_backend_that_has_the_scheme_keeps_all_of_it() -> None:
    able = Capabilities(backend="x", bits=(8,), kinds=("linear",), schemes=("affine", "entropy_coded"))
    assert legalise(BY_STEP, able, "error") == (BY_STEP, ())
    with pytest.raises(
        SettingError,
        match=r"x cannot run .*'fc': 1\.25 coded bits, entropy-coded, step 0\.25, but x has no entropy_coded scheme\. "
        r"Use legalise\(plan, \.\.\.\) first",
    ):
        require_legal(BY_STEP, Capabilities(backend="x", bits=(8,), kinds=("linear",)))


def test_eight_bits_with_a_region_bit_stay_eight_for_nothing_is_wider() -> None:
    plan = plan_of(linear("a", 4, 8, Piecewise(granularity="per_channel"), 8))
    legal, (change,) = legalise(plan, Capabilities(backend="x", bits=tuple(range(2, 9)), kinds=("linear",)))
    assert legal.layers[0].bits == 8
    assert change.why == "x has no piecewise scheme"


def test_scales_of_groups_become_those_of_channels_where_the_backend_has_both_others() -> None:
    plan = plan_of(linear("a", 4, 8, Affine(granularity="per_group", group_size=2), 4))
    legal, (change,) = legalise(plan, Capabilities(backend="x", bits=(4,), kinds=("linear",)))
    assert legal.layers[0].scheme == PER_CHANNEL
    assert "no per_group scales" in change.why


def test_scales_beside_quantized_activations_are_those_the_backend_has_there() -> None:
    able = Capabilities(backend="x", bits=(4,), kinds=("linear",), activation_bits=(None, 8),
                        activation_symmetric=(True,))  # fmt: skip
    plan = plan_of(linear("fc", 4, 2, PER_CHANNEL, 4))
    assert legalise(plan, able) == (plan, ())
    legal, (change,) = legalise(plan.with_activation_bits(8), able)
    assert legal.layers[0].scheme == Affine(symmetric=True, granularity="per_channel")
    assert "only symmetric scales" in change.why


def test_a_kind_that_is_not_quantized_is_listed_and_stays_in_floating_point() -> None:
    able = Capabilities(backend="convs", bits=(8,), kinds=("conv2d",))
    legal, (change,) = legalise(plan_of(linear("fc", 4, 2, Affine(), 8)), able)
    assert legal.layers[0].bits == 32
    assert (change.after, change.cost) == ("float32", 4 * 2 * 24 - 40)
    assert names(change.why, "convs", "linear", "floating point")


@pytest.mark.parametrize(("policy", "expected"), [("up", 32), ("nearest", None)])
def test_a_part_in_floating_point_is_a_change(policy: Policy, expected: int | None) -> None:
    plan = plan_of(linear("fc", 4, 2, Affine(symmetric=True), {4: (0, 1), 16: (2, 3)}))
    legal, (change,) = legalise(plan, EVEN, policy)
    assert legal.layers[0].bits == expected
    if expected is None:
        assert {part.bits for part in legal.layers[0].all_parts} == {4, 8}
    assert "16 bits" in change.why or "partly in floating point" in change.why


def test_what_quantized_activations_rule_out_is_a_change() -> None:
    able = Capabilities(backend="x", bits=(4,), kinds=("linear", "conv2d"), activation_bits=(None, 8),
                        activation_kinds=("conv2d",), activation_symmetric=(True,))  # fmt: skip
    plan = plan_of(linear("fc", 4, 2, Affine(), 4))
    assert legalise(plan, able)[1] == ()
    legal, (change,) = legalise(plan.with_activation_bits(8), able)
    assert (legal.layers[0].bits, legal.layers[0].activations) == (4, None)
    assert change.why == "x quantizes no inputs of linear layers"
    legal, (change,) = legalise(plan.with_activation_bits(8), replace(able, activation_bits=(8,)))
    assert legal.layers[0].bits == 32
    assert "beside 8-bit activations" in change.why


@pytest.mark.parametrize(
    "empty", [{"bits": ()}, {"kinds": ()}, {"activation_bits": ()}, {"granularities": ("per_group",)}]
)
def test_capabilities_must_leave_something(empty: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="need"):
        Capabilities(**({"backend": "x", "bits": (4,), "kinds": ("linear",)} | empty))


def test_activations_are_a_change_like_any_other() -> None:
    plan = plan_of(linear("fc", 4, 2, PER_CHANNEL, 8)).with_activation_bits(3)
    legal, (change,) = legalise(plan, INT8)
    assert legal.layers[0].activation_bits == 8
    assert (change.layer, change.before, change.after) == (
        "activations", "3 bits, asymmetric mse", "8 bits, asymmetric mse",
    )  # fmt: skip
    assert change.why == "int8 has activations at 8, 5 bits more for every input value"


def test_inputs_wider_than_a_backend_has_go_to_floating_point_where_it_has_that() -> None:
    plan = plan_of(linear("fc", 4, 2, PER_CHANNEL, 8)).with_activation_bits(16)
    with pytest.raises(SettingError, match=naming("activations of 16 bits", "nothing above", 8, "nearest")):
        legalise(plan, INT8)
    both = replace(INT8, activation_bits=(None, 8))
    legal, (change,) = legalise(plan, both)
    assert legal.layers[0].activations is None
    assert change.why == "int8 has activations at floating point, 8, 16 bits more for every input value"
    legal, (change,) = legalise(plan, both, "nearest")
    assert legal.layers[0].activation_bits == 8
    assert change.why.endswith("8 bits fewer for every input value")


def test_refusals_list_every_layer_and_the_remedy() -> None:
    plan = plan_of(linear("a", 4, 2, PER_CHANNEL, 3), linear("b", 4, 2, PER_CHANNEL, 5)).with_activation_bits(8)
    with pytest.raises(SettingError, match=naming("int8", "'a'", 3, "'b'", 5, 8, "legalise")):
        require_legal(plan, INT8)
    four = Capabilities(backend="four", bits=(4,), kinds=("linear",))
    with pytest.raises(SettingError, match=naming("'b'", 5, "four", 4, "policy=")):
        legalise(plan.with_activation_bits(None), four)
    with pytest.raises(SettingError, match=naming("policy", "'down'", "up", "nearest", "error")):
        legalise(plan, INT8, "down")  # type: ignore[arg-type]


def test_a_legalised_plan_is_looked_up_by_its_own_layers() -> None:
    plan = plan_of(linear("fc", 4, 2, Affine(), 3))
    assert plan.by_name["fc"].bits == plan.by_any_name["fc"].bits == 3
    legal, _ = legalise(plan, Capabilities(backend="wide", bits=(8,), kinds=("linear",)))
    assert legal.by_name["fc"].bits == legal.by_any_name["fc"].bits == 8


VALUES: tuple[Any, ...] = (None, 3, "plan.json", {}, INT8, plan_of(linear("fc", 4, 2, PER_CHANNEL, 4)))


@pytest.mark.parametrize("policy", ["up", "nearest", "error"])
@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{value!r:.20}")
def test_what_is_no_plan_or_no_capabilities_is_named(value: Any, policy: Policy) -> None:
    if not isinstance(value, Plan):
        with pytest.raises(SettingError, match=naming("plan", f"is a {type(value).__name__}, no Plan")):
            legalise(value, INT8, policy)
    if not isinstance(value, Capabilities):
        with pytest.raises(SettingError, match=naming("capabilities", f"{value!r:.60}")):
            legalise(plan_of(linear("fc", 4, 2, PER_CHANNEL, 4)), value, policy)


GROUPED = Capabilities(
    backend="grouped", bits=(4, 8), kinds=("linear",), granularities=("per_channel", "per_group"),
    group_sizes=(32, 64, 128),
)  # fmt: skip


@pytest.mark.parametrize(
    ("inputs", "size", "expected"),
    [(256, 128, 128), (256, 256, 128), (192, 96, 64), (192, 48, 32), (192, 16, 32), (160, 80, 32), (48, 16, None)],
)
def test_groups_become_the_largest_that_are_no_larger_or_else_the_smallest_that_fit(
    inputs: int, size: int, expected: int | None
) -> None:
    scheme = Affine(granularity="per_group", group_size=size)
    plan = plan_of(linear("fc", 4, inputs, scheme, 4))
    legal, changes = legalise(plan, GROUPED)
    assert legal.layers[0].scheme.group_size == expected
    assert legal.layers[0].scheme.granularity == ("per_group" if expected else "per_channel")
    assert [change.why for change in changes] == ([] if size == expected else
        [f"grouped has no groups of {size}, only of 32, 64, 128"])  # fmt: skip
    assert legalise(legal, GROUPED) == (legal, ())


def test_groups_of_no_size_are_refused() -> None:
    with pytest.raises(SettingError, match="group_sizes need one value or more, or None"):
        Capabilities(backend="none", bits=(4,), kinds=("linear",), group_sizes=())


@pytest.mark.parametrize("scheme", [Affine(stochastic=7), replace(PER_CHANNEL, symmetric=True, stochastic=0)])
def test_stochastic_rounding_becomes_to_nearest_where_the_backend_rounds_weights_itself(scheme: Affine) -> None:
    plan = plan_of(linear("fc", 4, 2, scheme, 4))
    assert legalise(plan, ANYTHING) == (plan, ())
    able = replace(ANYTHING, stochastic=False)
    legal, (change,) = legalise(plan, able)
    assert legal.layers[0].scheme == replace(scheme, stochastic=None)
    assert change.cost == 0
    assert "rounds weights itself, to nearest" in change.why
    with pytest.raises(SettingError, match=naming("fc", "rounded stochastically", "to nearest")):
        require_legal(plan, able)
