"""Integers against the weights they stand for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import Affine, EntropyCoded, LayerChoice, Part, Piecewise
from mpq_plugins.errors import SettingError
from mpq_plugins.simulation.integers import integer_weight
from mpq_plugins.simulation.layer import simulate_layer
from tests.helpers.plans import linear

SCHEMES = [Affine(symmetric=s, granularity=g, range=r) for s in (False, True) for g in ("per_tensor", "per_channel")
           for r in ("minmax", "mse")] + [Affine(granularity="per_group", group_size=2)]  # fmt: skip
SCHEMES += [Affine(symmetric="full", granularity="per_channel", range=r, scale_dtype=d) for r in ("minmax", "mse")
            for d in ("float32", "float16")] + [Affine(granularity="per_channel", scale_dtype="bfloat16")]  # fmt: skip


@given(st.sampled_from(SCHEMES), st.lists(st.integers(1, 8), min_size=1, max_size=9), st.integers(0, 99))
def test_integers_are_the_weight_and_fit_their_bits(scheme: Affine, widths: list[int], seed: int) -> None:
    weight = torch.randn(len(widths), 6, generator=torch.Generator().manual_seed(seed)) * 3
    groups = {b: tuple(i for i, w in enumerate(widths) if w == b) for b in set(widths)}
    choice = linear("fc", len(widths), 6, scheme, groups if len(groups) > 1 else widths[0])
    lowered = integer_weight(weight, choice)
    assert lowered.dequantized().equal(simulate_layer(weight, choice))
    for bits, codes in zip(widths, lowered.codes.tolist(), strict=True):
        assert all(-(2 ** (bits - 1)) <= code <= max(2 ** (bits - 1) - 1, 1) for code in codes)
    assert lowered.one_scale == (scheme.granularity == "per_tensor" and len(groups) == 1)


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_all_zero_channels_have_a_scale_to_divide_by(scheme: Affine, bits: int) -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    for own in (weight, weight * 0):
        lowered = integer_weight(own, linear("fc", 4, 6, scheme, bits))
        assert (lowered.scale != 0).all()
        assert lowered.dequantized().equal(simulate_layer(own, linear("fc", 4, 6, scheme, bits)))


def test_channels_lie_on_any_axis() -> None:
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    parts = (Part(bits=2, channels=(0, 2)), Part(bits=8, channels=(1,)))
    choice = LayerChoice(name="up", kind="conv_transpose2d", shape=(4, 3, 2, 2), channel_axis=1, numel=48, parts=parts,
                         scheme=Affine(granularity="per_channel"))  # fmt: skip
    assert integer_weight(weight, choice).dequantized().equal(simulate_layer(weight, choice))
    by_step = choice.model_copy(update={"scheme": EntropyCoded(step=2.0)})
    assert integer_weight(weight, by_step).dequantized().equal(simulate_layer(weight, by_step))


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [(Piecewise(), 3), (Affine(), {4: (0,), 32: (1,)})],
)
def test_what_has_no_such_form_is_refused(scheme: Affine | Piecewise, bits: int | dict[int, tuple[int, ...]]) -> None:
    with pytest.raises(SettingError, match="layer 'fc'"):
        integer_weight(torch.randn(2, 4), linear("fc", 2, 4, scheme, bits))


@given(
    st.sampled_from([scheme for scheme in SCHEMES if scheme.group_size is None]),
    st.lists(st.tuples(st.integers(1, 8), st.sampled_from([-2.5, -0.3, 0.0, 0.7, 3.0])), min_size=1, max_size=9),
    st.integers(0, 99),
)
def test_rescaled_integers_are_the_weight_times_a_factor(
    scheme: Affine, channels: list[tuple[int, float]], seed: int
) -> None:
    weight = torch.randn(len(channels), 6, generator=torch.Generator().manual_seed(seed)) * 3
    widths, factors = [bits for bits, _ in channels], torch.tensor([factor for _, factor in channels])
    groups = {b: tuple(i for i, w in enumerate(widths) if w == b) for b in set(widths)}
    choice = linear("fc", len(widths), 6, scheme, groups if len(groups) > 1 else widths[0])
    before = integer_weight(weight, choice)
    after = before.rescaled(factors)
    torch.testing.assert_close(after.dequantized(), before.dequantized() * factors[:, None])
    zero = factors[:, None] == 0
    assert after.scale.sign().equal(torch.where(zero, 1.0, before.scale.sign()))
    for bits, old, new in zip(widths, before.codes.tolist(), after.codes.tolist(), strict=True):
        assert all(-(2 ** (bits - 1)) <= code <= 2 ** (bits - 1) for code in new)
        assert len({*new}) in (1, len({*old}))
