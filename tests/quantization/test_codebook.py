"""Codebooks: codes of the nearest centroid, exact where they can be, measured as they are applied."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import Codebook
from mpq_plugins.allocation.make import make_plan
from mpq_plugins.errors import SettingError, WeightError
from mpq_plugins.measurement import units
from mpq_plugins.plans.codebook import INITS
from mpq_plugins.plans.granular import GRANULARITIES
from mpq_plugins.quantization import kernel
from mpq_plugins.quantization.codebook import dequantize, encode, quantize
from mpq_plugins.quantization.quantize import fake_quantize
from mpq_plugins.weights import chunks

SCHEMES = [
    Codebook(granularity=grain, group_size=4 if grain == "per_group" else None, init=init)  # type: ignore[arg-type]
    for grain, init in itertools.product(GRANULARITIES, INITS)
]


def weights(elements: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    shapes = st.tuples(st.integers(1, 5), st.sampled_from([4, 8]))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements)).map(torch.from_numpy)


@given(weights(st.floats(-1e3, 1e3, width=32)), st.sampled_from([1, 2]), st.sampled_from(SCHEMES))
def test_every_weight_gets_the_nearest_centroid_of_its_group(weight: Tensor, bits: int, scheme: Codebook) -> None:
    quantized = quantize(weight, bits, scheme)
    centroids = quantized.centroids.double()
    rows = weight.double().reshape(len(centroids), -1)
    nearest = (rows[:, :, None] - centroids[:, None, :]).abs().amin(2)
    found = dequantize(quantized).double().reshape(rows.shape)
    assert (found - rows).abs().equal(nearest)
    assert quantized.codes.amin() >= 0
    assert quantized.codes.amax() < 2**bits


@given(weights(st.floats(-1e3, 1e3, width=32)), st.sampled_from([1, 2]), st.sampled_from(SCHEMES))
def test_what_is_shared_stays_as_it_is(weight: Tensor, bits: int, scheme: Codebook) -> None:
    once = fake_quantize(weight, bits, scheme)
    assert fake_quantize(once, bits, scheme).equal(once)


@given(weights(st.floats(-10, 10, width=32)), st.data(), st.sampled_from(SCHEMES))
def test_pruned_weights_stay_pruned(weight: Tensor, data: st.DataObject, scheme: Codebook) -> None:
    mask = torch.from_numpy(data.draw(hnp.arrays(np.bool_, tuple(weight.shape))))
    found = fake_quantize(weight * mask, 2, scheme)
    assert (found[~mask] == 0).all()


@given(weights(st.floats(-1e6, 1e6, width=32)), st.sampled_from(SCHEMES))
def test_the_kernels_sums_are_those_of_the_weights_it_gives(weight: Tensor, scheme: Codebook) -> None:
    for bits in (1, 2):
        quantized = quantize(weight, bits, scheme)
        rows = weight.reshape(len(quantized.centroids), -1)
        relative, squared, largest = kernel.error_sums(rows, quantized.grid, True)[:, 0].T
        error = (dequantize(quantized).reshape(rows.shape).double() - rows.double()).abs()
        parts = torch.where(rows != 0, error / rows.double().abs(), 0).sum(1)
        np.testing.assert_allclose(relative, parts, rtol=1e-9)
        np.testing.assert_allclose(squared, error.square().sum(1), rtol=1e-9)
        np.testing.assert_allclose(largest, error.amax(1), rtol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_table_has_the_errors_of_what_is_applied(scheme: Codebook, per_channel: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(8, 6, 2), nn.Linear(16, 5))
    table = mpq.measure(net, scheme, bits=(1, 2), metrics=("mse", "relative"), per_channel=per_channel)
    for bits in (1, 2):
        quantized = mpq.apply(net, mpq.Uniform(bits=bits)(table))
        for layer, before, after in zip(table.layers, net, quantized, strict=True):  # type: ignore[call-overload]
            error = (before.weight - after.weight).detach().double().square()
            assert table.error(layer, "mse", bits) == pytest.approx(error.mean().item(), rel=1e-6)
            if per_channel:
                by_channel = error.movedim(layer.channel_axis, 0).flatten(1).mean(1)
                np.testing.assert_allclose(table.channel_error(layer, "mse", bits), by_channel, rtol=1e-6)


def test_a_layer_of_many_chunks_is_measured_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 50))
    whole = mpq.measure(net, Codebook(), bits=(2, 4))
    monkeypatch.setattr(chunks, "CHUNK", 64 * 7)
    monkeypatch.setattr(units, "SMALLEST", 64)
    cut = mpq.measure(net, Codebook(), bits=(2, 4))
    for metric in ("mse", "relative"):
        np.testing.assert_allclose(cut.errors(metric, (2, 4)), whole.errors(metric, (2, 4)), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_itself(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(5)).to(dtype)
    back = fake_quantize(weight, 4, Codebook())
    assert back.dtype == dtype
    assert back.equal(fake_quantize(weight.float(), 4, Codebook()).to(dtype))
    assert fake_quantize(back, 4, Codebook()).equal(back)


def test_the_channel_axis_is_anywhere() -> None:
    weight = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(6))
    scheme = Codebook(granularity="per_channel")
    moved = fake_quantize(weight, 3, scheme, channel_axis=1)
    assert moved.equal(fake_quantize(weight.movedim(1, 0), 3, scheme).movedim(0, 1))


def test_odd_weights() -> None:
    for shape in ((0, 4), (4, 0)):
        for scheme in SCHEMES:
            assert fake_quantize(torch.zeros(shape), 2, scheme).shape == shape
    spread = torch.linspace(-3, 3, 24).reshape(4, 6)
    for factor in (1e-44, 1e38):
        assert fake_quantize(spread * factor, 2, Codebook()).isfinite().all()
    assert encode(torch.zeros(0, 3), torch.zeros(0, 4)).shape == (0, 3)


@pytest.mark.parametrize("bits", [0, 9, True, 2.0])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(SettingError, match=r"layer 'fc': bits: .* not allowed; 1 to 8"):
        quantize(torch.ones(20, 20), bits, layer="fc")


def test_more_centroids_than_weights_are_refused_wherever_they_are_asked_for() -> None:
    said = r"layer '0': 4 bits are 16 centroids, more than the 9 weights .* Use at most 3 bits"
    net = nn.Sequential(nn.Linear(9, 4))
    scheme = Codebook(granularity="per_channel")
    with pytest.raises(SettingError, match=said):
        quantize(net[0].weight, 4, scheme, layer="0")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=said):
        mpq.measure(net, scheme, bits=(2, 4))
    table = mpq.measure(net, scheme, bits=(2, 3))
    with pytest.raises(SettingError, match=said):
        make_plan(table, mpq.Uniform(bits=3), {"0": 4})
    document = mpq.Uniform(bits=3)(table).model_dump(mode="json")
    document["layers"][0]["bits"] = 4
    with pytest.raises(mpq.FormatError, match=said):
        mpq.Plan.from_document(document, "plan.json")
    with pytest.raises(SettingError, match="Use another scheme"):
        quantize(torch.ones(3, 1), 1, scheme)


def test_bad_weights_and_settings_are_refused() -> None:
    with pytest.raises(WeightError, match="layer 'fc': 1 of 4 weights"):
        quantize(torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), 1, layer="fc")
    with pytest.raises(SettingError, match="init: 'random' is not allowed; linear, optimal, density, forgy"):
        Codebook(init="random")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="scheme: 'affine' is not allowed; codebook"):
        Codebook(name="affine")  # type: ignore[arg-type]


def test_a_plan_counts_its_codebooks() -> None:
    net = nn.Sequential(nn.Linear(64, 10))
    whole, by_channel = (
        mpq.Uniform(bits=3)(mpq.measure(net, Codebook(granularity=grain), bits=(3,))).size()
        for grain in ("per_tensor", "per_channel")
    )
    assert whole.total_bits == 640 * 3 + 8 * 32
    assert by_channel.total_bits == 640 * 3 + 10 * 8 * 32
    assert whole.weights_only_bits == 640 * 3


def test_backends_without_codebooks_say_so() -> None:
    from mpq_plugins.plans.capabilities import Capabilities
    from mpq_plugins.plans.legalise import legalise

    plan = mpq.Uniform(bits=3)(mpq.measure(nn.Sequential(nn.Linear(64, 10)), Codebook(), bits=(3,)))
    legal, (change,) = legalise(plan, Capabilities(backend="x", bits=(3, 4), kinds=("linear",)))
    assert legal.layers[0].scheme == mpq.Affine()
    assert legal.layers[0].bits == 3
    assert change.why == "x has no codebook scheme"
