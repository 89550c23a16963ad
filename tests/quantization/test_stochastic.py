"""Stochastic rounding: right on average, on the grid, and the same codes however a weight is cut."""

import itertools
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import Affine, Plan, SettingError
from mpq_plugins.quantization.affine import dequantize, quantize
from mpq_plugins.quantization.quantize import fake_quantize
from mpq_plugins.quantization.stochastic import draws
from mpq_plugins.weights import chunks
from tests.quantization.test_affine import weights

SEED = 7
HALF = np.array([[0.5]], np.float32)
NEAREST = (
    Affine(),
    Affine(symmetric=True, granularity="per_channel"),
    Affine(symmetric="full", granularity="per_channel"),
    Affine(granularity="per_channel", range="mse"),
    Affine(granularity="per_group", group_size=8, scale_dtype="float16"),
    Affine(range="percentile", share=0.9),
)
SCHEMES = tuple(replace(scheme, stochastic=SEED) for scheme in NEAREST)
BITS = (1, 2, 3, 4, 8)


def weight(rows: int = 12, columns: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def levels(kept: Tensor, bits: int, scheme: Affine) -> list[list[float]]:
    """The levels of each output channel's first group, by Python's own arithmetic."""
    grid = quantize(kept, bits, replace(scheme, stochastic=None)).grid
    codes = (-1, 1) if bits == 1 else range(int(grid.qmin[0]), int(grid.qmax[0]) + 1)
    return [sorted((code - int(z)) * float(s) for code in codes)
            for s, z in zip(grid.scale[:, 0], grid.zero_point[:, 0], strict=True)]  # fmt: skip


def slow_draw(value: float, place: int, scale: float, seed: int) -> float:
    """SplitMix64's mixing in Python's integers."""
    whole = 2**64 - 1

    def mixed(word: int) -> int:
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & whole
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB & whole
        return word ^ (word >> 31)

    (value_bits,), (scale_bits,) = (struct.unpack("<I", struct.pack("<f", number)) for number in (value, scale))
    key = mixed(mixed((seed + 1) * 0x9E3779B97F4A7C15 & whole) + scale_bits & whole)
    return (mixed(mixed((value_bits << 32 | place) ^ key) + key & whole) >> 11) / 2**53


def test_draws_are_those_of_a_slow_loop_and_uniform() -> None:
    rows, scale = weight(5, 7).numpy(), np.array([[0.1], [0.2], [-0.3], [1e-30], [7.0]], np.float32)
    for seed in (0, 1, 2**53):
        drawn = draws(rows, scale, seed)
        for (row, column), got in np.ndenumerate(drawn):
            assert got == slow_draw(float(rows[row, column]), column, float(scale[row, 0]), seed)
    many = draws(weight(100, 10_000).numpy(), HALF, SEED).reshape(-1)
    shares = np.histogram(many, bins=64, range=(0, 1))[0] / many.size
    assert np.abs(shares - 1 / 64).max() < 5 * math.sqrt(1 / 64 / many.size)
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 5 / math.sqrt(many.size)
    other = draws(weight(100, 10_000).numpy(), HALF, SEED + 1).reshape(-1)
    assert abs(np.corrcoef(many, other)[0, 1]) < 5 / math.sqrt(many.size)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_on_average_a_weight_stays_what_it_is_and_one_beyond_the_grid_has_its_end(scheme: Affine) -> None:
    """Within five standard errors of the mean of so many draws, each of which is between two levels."""
    kept, seeds = weight(6, 16), 200
    for bits in (1, 3):
        made = torch.stack([fake_quantize(kept, bits, replace(scheme, stochastic=seed)) for seed in range(seeds)])
        per_group = kept.shape[1] // (scheme.group_size or kept.shape[1])
        table = levels(kept, bits, scheme)
        for row, column in np.ndindex(*kept.shape):
            group = 0 if len(table) == 1 else row * per_group + column // (scheme.group_size or kept.shape[1])
            own = table[group]
            exact = min(max(float(kept[row, column]), own[0]), own[-1])
            gap = max((b - a for a, b in itertools.pairwise(own) if a <= exact <= b), default=0.0)
            mean = float(made[:, row, column].double().mean())
            assert abs(mean - exact) <= 5 * gap / 2 / math.sqrt(seeds) + 1e-5 * abs(exact)


@given(weights(), st.sampled_from(BITS), st.sampled_from(SCHEMES[:4]), st.integers(0, 2**53))
def test_each_weight_goes_to_a_level_beside_it_of_the_nearest_ones_grid(
    kept: Tensor, bits: int, scheme: Affine, seed: int
) -> None:
    made = quantize(kept, bits, replace(scheme, stochastic=seed))
    near = quantize(kept, bits, replace(scheme, stochastic=None))
    assert np.array_equal(made.grid.scale, near.grid.scale)
    assert np.array_equal(made.grid.zero_point, near.grid.zero_point)
    assert int(made.codes.min()) >= int(near.grid.qmin[0])
    assert int(made.codes.max()) <= int(near.grid.qmax[0])
    assert int((made.codes - near.codes).abs().max()) <= (2 if bits == 1 else 1)
    if bits > 1:  # where zero is a level
        assert not dequantize(made)[kept == 0].any()


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_what_lies_on_the_grid_stays(scheme: Affine, bits: int) -> None:
    near = replace(scheme, stochastic=None)
    kept = fake_quantize(fake_quantize(weight(), bits, near), bits, near)
    assert fake_quantize(kept, bits, near).equal(kept)
    for seed in range(20):
        assert fake_quantize(kept, bits, replace(scheme, stochastic=seed)).equal(kept)


@pytest.mark.parametrize("kept", [torch.zeros(3, 4), torch.full((3, 4), -0.7), torch.zeros(3, 0), torch.tensor(0.5)],
                         ids=["zeros", "constant", "empty", "scalar"])  # fmt: skip
def test_weights_that_leave_no_choice(kept: Tensor) -> None:
    for scheme in (Affine(stochastic=SEED), Affine(stochastic=SEED, symmetric=True)):
        for bits in BITS:
            assert fake_quantize(kept, bits, scheme).equal(fake_quantize(kept, bits, replace(scheme, stochastic=None)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_measured_is_the_error_of_the_codes_that_are_made(scheme: Affine, dtype: torch.dtype) -> None:
    layer = nn.Linear(32, 24).to(dtype)
    net, exact = nn.Sequential(layer), layer.weight.detach().double()
    table = mpq.measure(net, scheme, BITS, ("relative", "mse", "max_abs"), per_channel=True)
    for column, bits in enumerate(BITS):
        made = quantize(layer.weight, bits, scheme)
        groups = made.grid.scale.shape[0]
        steps = (made.codes.reshape(groups, -1) - torch.from_numpy(made.grid.zero_point)).double()
        error = (steps * torch.from_numpy(made.grid.scale).double()).reshape(exact.shape) - exact
        own = {"mse": error.square().mean(1), "relative": (error.abs() / exact.abs()).mean(1),
               "max_abs": error.abs().amax(1)}  # fmt: skip
        for metric, by_channel in own.items():
            np.testing.assert_allclose(table.layers[0].channel_errors[metric][column], by_channel, rtol=1e-12)
            whole = by_channel.max() if metric == "max_abs" else by_channel.mean()
            assert table.layers[0].errors[metric][column] == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_do_not_depend_on_how_a_weight_is_cut(scheme: Affine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on chunks nor on the block that is drawn for at a time, nor on threads."""
    net = nn.Sequential(nn.Linear(32, 24), *([] if scheme.group_size else [nn.Conv2d(4, 6, 3)]))
    whole = mpq.measure(net, scheme, BITS, per_channel=True)
    codes = [quantize(layer.weight, 3, scheme).codes for layer in net]  # type: ignore[arg-type]
    monkeypatch.setattr("mpq_plugins.quantization.stochastic.BLOCK", 40)
    monkeypatch.setattr(chunks, "CHUNK", 64)
    cut = mpq.measure(net, scheme, BITS, per_channel=True)
    assert all(quantize(layer.weight, 3, scheme).codes.equal(own)  # type: ignore[arg-type]
               for layer, own in zip(net, codes, strict=True))  # fmt: skip
    for before, after in zip(whole.layers, cut.layers, strict=True):
        for metric, errors in before.channel_errors.items():
            np.testing.assert_allclose(after.channel_errors[metric], errors, rtol=1e-12)
        for metric, errors in before.errors.items():
            np.testing.assert_allclose(after.errors[metric], errors, rtol=1e-12)


def test_channels_have_the_same_codes_in_whatever_part_of_a_layer_they_are() -> None:
    scheme = Affine(granularity="per_channel", stochastic=SEED)
    kept = weight()
    whole = fake_quantize(kept, 3, scheme)
    some = torch.tensor([7, 2, 11])
    assert fake_quantize(kept[some], 3, scheme).equal(whole[some])
    assert fake_quantize(kept.t().contiguous(), 3, scheme, channel_axis=1).equal(whole.t())


def test_a_plan_is_applied_kept_in_files_compressed_and_verified(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)).eval()
    scheme = Affine(granularity="per_channel", stochastic=SEED)
    plan = mpq.Uniform(bits=3)(mpq.measure(net, scheme))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.layers[0].scheme == scheme
    made = mpq.apply(net, Plan.load(tmp_path / "plan.json"))
    weights_made = made.get_parameter("0.weight")
    mpq.verify(made, plan, net)
    assert weights_made.equal(fake_quantize(net.get_parameter("0.weight"), 3, scheme))
    with pytest.raises(mpq.VerifyError, match="differs from what the plan makes"):
        mpq.verify(mpq.apply(net, mpq.Uniform(bits=3)(mpq.measure(net, replace(scheme, stochastic=8)))), plan, net)
    mpq.compress(net, plan, tmp_path / "net.mpq")
    back = mpq.decompress(tmp_path / "net.mpq")
    assert torch.as_tensor(back["0.weight"]).equal(weights_made)
    batch = torch.randn(16, 3, 4, 4)
    corrected = mpq.apply(net, plan, calibrate=[batch], rounding="nearest")
    mpq.verify(corrected, plan, net)


def test_a_file_without_the_seed_is_to_nearest_and_one_to_nearest_says_nothing_of_it() -> None:
    plan = mpq.Uniform(bits=3)(mpq.measure(nn.Sequential(nn.Linear(8, 8))))
    assert "stochastic" not in plan.to_json()
    assert Plan.model_validate_json(plan.to_json()).layers[0].scheme == Affine()


@pytest.mark.parametrize("seed", [-1, 1.0, True, "3", 2**53 + 1])
def test_what_is_no_seed_is_refused(seed: object) -> None:
    with pytest.raises(SettingError, match=r"^stochastic: .* is not allowed; a seed of 0 to "):
        Affine(stochastic=seed)  # type: ignore[arg-type]


def test_what_rounds_otherwise_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    plan = mpq.Uniform(bits=3)(mpq.measure(net, Affine(stochastic=SEED)))
    batches = [torch.randn(16, 8)]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for attempt, what in (
        (lambda: mpq.compensate(net, plan, batches), "compensated"),
        (lambda: mpq.reconstruct(net, plan, batches, steps=1), "learned"),
        (lambda: mpq.apply(net, plan, calibrate=batches), "compensated"),
        (lambda: mpq.evaluate(net, {"3": plan}, lambda _: 0.0, calibrate=batches), "compensated"),
    ):
        with pytest.raises(SettingError, match=rf"^'0', '1': rounded stochastically, and {what} rounding .*nearest"):
            attempt()
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
