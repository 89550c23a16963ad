"""Ranges of weights by percentile and by divergence: each group as if it were alone, and as inputs have them."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mpq_plugins import Affine, SettingError
from mpq_plugins.plans.affine import RangeName, Symmetry
from mpq_plugins.plans.granular import Granularity
from mpq_plugins.quantization.affine import quantize
from mpq_plugins.quantization.quantize import fake_quantize
from mpq_plugins.quantization.range_ends import kl_ends, percentile_ends
from mpq_plugins.quantization.value_sample import SortedValues

WEIGHT = torch.distributions.StudentT(torch.tensor(4.0))
torch.manual_seed(0)
ROWS = {
    "tailed": WEIGHT.sample((5, 600)),
    "positive": WEIGHT.sample((3, 600)).abs() + 0.1,
    "negative": -WEIGHT.sample((3, 600)).abs(),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("symmetric", [False, True, "full"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("range_name", ["percentile", "kl"])
def test_a_channels_range_is_that_of_its_values(
    name: str, symmetric: Symmetry, bits: int, range_name: RangeName
) -> None:
    share = 0.98 if range_name == "percentile" else None
    scheme = Affine(symmetric=symmetric, granularity="per_channel", range=range_name, share=share)
    grid = quantize(ROWS[name], bits, scheme).grid
    for row, scale, zero_point in zip(ROWS[name].double().numpy(), grid.scale, grid.zero_point, strict=True):
        values = SortedValues.of(np.sort(row))
        if share is not None:
            low, high = percentile_ends(values, share, symmetric=bool(symmetric))
        else:
            low, high = kl_ends(values, bits, symmetric=bool(symmetric))
        if symmetric:
            reach = min(high, float(np.abs(row).max()))
            assert abs(scale[0]) == pytest.approx(reach / (2 ** (bits - 1) - (symmetric is True)), rel=1e-6)
            if symmetric == "full" and name != "tailed":
                assert (scale[0] < 0) == (name == "positive")  # the code more is where the weights are
        else:
            assert scale[0] == pytest.approx((high - low) / (2**bits - 1), rel=1e-6)
            assert zero_point[0] == round(-low / float(scale[0]))


@pytest.mark.parametrize("range_name", ["percentile", "kl"])
@pytest.mark.parametrize(
    ("granularity", "group_size"), [("per_tensor", None), ("per_channel", None), ("per_group", 20)]
)
def test_groups_are_alone(range_name: RangeName, granularity: Granularity, group_size: int | None) -> None:
    weight = ROWS["tailed"]
    scheme = Affine(granularity=granularity, group_size=group_size, range=range_name)
    groups = {"per_tensor": weight.reshape(1, -1), "per_channel": weight, "per_group": weight.reshape(-1, 20)}
    alone = [fake_quantize(row[None], 4, Affine(range=range_name)) for row in groups[granularity]]
    assert torch.equal(fake_quantize(weight, 4, scheme), torch.cat(alone).reshape(weight.shape))


@pytest.mark.parametrize("range_name", ["percentile", "kl"])
@pytest.mark.parametrize("symmetric", [False, True, "full"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_what_is_constant_or_sparse_is_kept(range_name: RangeName, symmetric: Symmetry, bits: int) -> None:
    scheme = Affine(symmetric=symmetric, granularity="per_channel", range=range_name)
    plain = Affine(symmetric=symmetric, granularity="per_channel")
    weight = torch.zeros(4, 400)
    weight[0], weight[1], weight[2, 7] = 0.3, -0.3, 1e-3
    kept = fake_quantize(weight, bits, scheme)
    assert torch.equal(kept[[0, 1, 3]], fake_quantize(weight, bits, plain)[[0, 1, 3]])
    if bits > 1:
        assert kept[2, 7] != 0
        narrow = Affine(symmetric=symmetric, granularity="per_channel", range="percentile", share=0.9)
        assert torch.equal(fake_quantize(weight, bits, narrow), fake_quantize(weight, bits, plain))


def test_a_share_of_one_is_min_max() -> None:
    for symmetric in (False, True):
        whole = Affine(symmetric=symmetric, granularity="per_channel", range="percentile", share=1.0)
        plain = Affine(symmetric=symmetric, granularity="per_channel")
        assert torch.equal(fake_quantize(ROWS["tailed"], 3, whole), fake_quantize(ROWS["tailed"], 3, plain))


def test_a_smaller_share_is_a_smaller_range() -> None:
    scales = [
        quantize(ROWS["tailed"], 4, Affine(granularity="per_channel", range="percentile", share=share)).grid.scale
        for share in (1.0, 0.999, 0.99, 0.9, 0.6)
    ]
    for wide, narrow in pairwise(scales):
        assert (narrow < wide).all()


def test_clipping_a_tail_pays_at_few_bits() -> None:
    def error(scheme: Affine) -> float:
        return float((fake_quantize(ROWS["tailed"], 3, scheme) - ROWS["tailed"]).square().sum())

    plain = error(Affine(granularity="per_channel"))
    assert error(Affine(granularity="per_channel", range="percentile", share=0.98)) < 0.5 * plain
    assert error(Affine(granularity="per_channel", range="kl")) < plain


def test_shares_are_checked_and_said() -> None:
    assert Affine(range="percentile") == Affine(range="percentile", share=0.9999)
    assert str(Affine(range="percentile", share=0.99)) == "asymmetric per_tensor percentile 0.99"
    assert Affine(range="kl").searches
    assert Affine(range="percentile").sorts
    assert not Affine(range="mse").sorts
    with pytest.raises(SettingError, match="share: belongs to the percentile range, and this is mse"):
        Affine(range="mse", share=0.9)
    for bad in (0.5, 1.1, True, "half", float("nan")):
        with pytest.raises(SettingError, match=r"share: .* is not allowed; above 0\.5, at most 1"):
            Affine(range="percentile", share=bad)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="range: 'entropy' is not allowed; minmax, percentile, mse, kl"):
        Affine(range="entropy")  # type: ignore[arg-type]
