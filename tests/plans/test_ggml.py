"""ggml's types as schemes: their sizes to the bit, the shapes they take, and what plans say of them."""

from typing import Any, get_args

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import GGML, Plan, Scheme, SettingError
from mpq_plugins.plans.ggml import NEEDS_IMPORTANCE, TYPES, TypeName
from mpq_plugins.plans.scheme_names import scheme_class
from tests.helpers.plans import linear, plan_of

KINDS = sorted(TYPES)
SIZES = {
    number.name.lower(): size for number, size in gguf.GGML_QUANT_SIZES.items()
    if size[0] > 1 and number.name not in ("Q8_1", "Q8_K", "Q1_0")
}  # fmt: skip


def test_it_is_a_scheme_by_its_name() -> None:
    assert isinstance(GGML(), Scheme)
    assert scheme_class("ggml") is GGML


def test_every_block_type_that_gguf_reads_is_one_and_of_its_size() -> None:
    assert {kind: (block.weights, block.size) for kind, block in TYPES.items()} == SIZES
    assert set(get_args(TypeName)) == set(TYPES) >= set(NEEDS_IMPORTANCE)


@pytest.mark.parametrize(
    ("kind", "bits", "true"),
    [
        ("iq1_s", 1, 1.5625), ("iq1_m", 1, 1.75), ("tq1_0", 1, 1.6875), ("tq2_0", 2, 2.0625), ("iq2_xxs", 2, 2.0625),
        ("iq2_xs", 2, 2.3125), ("iq2_s", 2, 2.5625), ("q2_k", 2, 2.625), ("iq3_xxs", 3, 3.0625), ("iq3_s", 3, 3.4375),
        ("q3_k", 3, 3.4375), ("iq4_xs", 4, 4.25), ("mxfp4", 4, 4.25), ("q4_k", 4, 4.5), ("iq4_nl", 4, 4.5),
        ("q4_0", 4, 4.5), ("nvfp4", 4, 4.5), ("q4_1", 5, 5.0), ("q5_k", 5, 5.5), ("q5_0", 5, 5.5), ("q5_1", 6, 6.0),
        ("q6_k", 6, 6.5625), ("q8_0", 8, 8.5),
    ],
)  # fmt: skip
def test_a_plans_size_is_the_files(kind: TypeName, bits: int, true: float) -> None:
    size = plan_of(linear("fc", 6, 512, GGML(type=kind), bits)).size()
    assert size.total_average_bits == true == GGML(type=kind).bits_per_weight
    assert size.weights_only_bits == 6 * 512 * bits
    assert plan_of(linear("fc", 6, 512, GGML(type=kind), bits)).size(scale_bits=16).total_average_bits == true


@pytest.mark.parametrize("kind", KINDS)
def test_a_type_has_one_width(kind: TypeName) -> None:
    scheme = GGML(type=kind)
    assert scheme.check_bits(scheme.bits) == scheme.bits
    for bits in {*range(1, 9)} - {scheme.bits}:
        with pytest.raises(SettingError, match=rf"^bits: {bits} is not allowed with ggml's {kind}, .*; {scheme.bits},"):
            scheme.check_bits(bits)
    with pytest.raises(SettingError, match="bits: True"):
        scheme.check_bits(True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "q4_k_m"}, r"type: 'q4_k_m' is not allowed; q4_0, .*nvfp4 \(types of tensors"),
        ({"type": "Q4_K"}, "type: 'Q4_K' is not allowed; q4_0, "),
        ({"type": "q8_1"}, "type: 'q8_1' is not allowed; "),
        ({"type": None}, "type: None is not allowed; "),
        ({"name": "affine"}, "scheme: 'affine' is not allowed; ggml"),
    ],
)
def test_what_is_no_type_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=f"^{message}"):
        GGML(**settings)


@given(st.sampled_from(KINDS), st.integers(1, 1024), st.integers(1, 1024), st.sampled_from([0, 1]))
def test_what_fits_is_a_matrix_of_whole_blocks(kind: TypeName, outputs: int, inputs: int, axis: int) -> None:
    shape = (outputs, inputs) if axis == 0 else (inputs, outputs)
    scheme, whole = GGML(type=kind), inputs % SIZES[kind][0] == 0
    assert scheme.fits(shape, axis) == whole
    if whole:
        assert scheme.groups_per_channel(shape, axis, "fc") * SIZES[kind][0] == inputs
        assert scheme.fallback(shape, axis) is scheme
        return
    with pytest.raises(SettingError, match=rf"^layer 'fc': ggml's {kind} has blocks of {SIZES[kind][0]}"):
        scheme.groups_per_channel(shape, axis, "fc")
    other = scheme.fallback(shape, axis)
    # Of blocks of 256 llama.cpp goes to types of 32, and of the others nowhere.
    assert (other is not None) == (inputs % 32 == 0 and SIZES[kind][0] == 256)
    assert other is None or other.fits(shape, axis)


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("q2_k", "q4_0"), ("q3_k", "q4_0"), ("q4_k", "q5_0"), ("q5_k", "q5_1"), ("q6_k", "q8_0"), ("tq1_0", "q4_0"),
        ("iq1_m", "iq4_nl"), ("iq2_xxs", "iq4_nl"), ("iq3_s", "iq4_nl"), ("iq4_xs", "iq4_nl"),
    ],
)  # fmt: skip
def test_fallbacks_are_llama_cpps(kind: TypeName, other: str) -> None:
    assert GGML(type=kind).fallback((10, 576), 0) == GGML(type=other)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=f"Use type {other}, as llama.cpp does, or skip the layer"):
        GGML(type=kind).groups_per_channel((10, 576), 0, "fc")


@pytest.mark.parametrize("shape", [(512,), (8, 256, 3), (8, 256, 3, 3)])
def test_only_matrices_fit(shape: tuple[int, ...]) -> None:
    assert not GGML().fits(shape, 0)
    assert GGML().fallback(shape, 0) is None
    with pytest.raises(SettingError, match=r"layer 'c': .*is no matrix.* Skip the layer"):
        GGML().groups_per_channel(shape, 0, "c")


def test_plans_keep_types() -> None:
    plan = plan_of(linear("a", 4, 256, GGML(type="q6_k"), 6), linear("b", 4, 64, GGML(type="nvfp4"), 4))
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    assert [layer.scheme for layer in again.layers] == [GGML(type="q6_k"), GGML(type="nvfp4")]
    assert '"scheme":{"name":"ggml","type":"q6_k"}' in plan.model_dump_json(exclude_none=True)


def test_a_plan_of_rows_that_are_no_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 'a': ggml's q4_k has blocks of 256"):
        linear("a", 4, 96, GGML(), 4)
