"""Sums of what quantization does, channel by channel, against plain sums over all values at once."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mpq_plugins.errors import SettingError
from mpq_plugins.simulation.shifts import (
    AT_ONCE,
    LONGEST,
    Shift,
    by_channel,
    channel_axis_of_output,
    own_biases,
    usual_vectors,
)
from tests.helpers.says import naming

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(count: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    exact = torch.randn(count, channels, generator=generator) + 1
    return exact, exact + torch.randn(exact.shape, generator=generator) / 3 + 0.2


def shift_of(exact: Tensor, rough: Tensor) -> Shift:
    shift = Shift()
    shift.add(exact, rough)
    return shift


def test_sums_over_many_rows_are_those_of_all_at_once() -> None:
    exact, rough = pair(2 * AT_ONCE + 5)
    shift = Shift()
    shift.add(exact, rough)
    shift.add(exact[:7], rough[:7])
    f, q = (torch.cat([one, one[:7]]).double() for one in (exact, rough))
    expected = {"f": f, "q": q, "ff": f * f, "qq": q * q, "fq": f * q}
    assert shift.count == len(f)
    for key, values in expected.items():
        torch.testing.assert_close(shift.sums[key], values.sum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_loses_the_mean_of_the_differences(bias: bool) -> None:
    exact, rough = pair(50)
    layer = nn.Linear(4, 3, bias=bias).requires_grad_(False)
    before = layer.bias.clone() if bias else torch.zeros(3)
    shift_of(exact, rough).correct("fc", layer, 1.0)
    torch.testing.assert_close(layer.bias, before - (rough - exact).mean(0), rtol=1e-5, atol=1e-6)
    assert not layer.bias.requires_grad  # a new one as the weight


@pytest.mark.parametrize("shrinkage", [0.0, 1.0, 2.0])
def test_a_norm_gets_means_variances_and_correlations_of_both(shrinkage: float) -> None:
    exact, rough = pair(500)
    norm = nn.BatchNorm1d(3)
    shift_of(exact, rough).correct("norm", norm, shrinkage)
    v_f, v_q = exact.double().var(0, unbiased=False), rough.double().var(0, unbiased=False)
    rho = torch.stack([torch.corrcoef(torch.stack([exact[:, k], rough[:, k]]).double())[0, 1] for k in range(3)])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, (rough - exact).mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), v_q / v_f / rho**shrinkage, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("module", [nn.Linear(4, 3), nn.BatchNorm1d(3)], ids=["bias", "norm"])
def test_values_that_are_no_numbers_are_refused_by_name(bad: float, module: nn.Module) -> None:
    exact, rough = pair(5)
    rough[2, 1] = bad
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(SettingError, match=naming("'block.fc'", "NaN")):
        shift_of(exact, rough).correct("block.fc", module, 1.0)
    assert all(before[name].equal(value) for name, value in module.state_dict().items())


@pytest.mark.parametrize(("times", "usual"), [(2.9, True), (3.1, False), (10.0, False)])
def test_an_output_of_three_times_the_median_length_is_long(times: float, usual: bool) -> None:
    vectors = torch.cat([torch.ones(9, 4), torch.full((1, 4), times)])
    assert usual_vectors(vectors).tolist() == [True] * 9 + [usual]


def test_padding_of_zeros_makes_no_output_long() -> None:
    vectors = torch.cat([torch.zeros(20, 4), torch.ones(9, 4), torch.full((1, 4), 10.0)])
    assert usual_vectors(vectors).tolist() == [True] * 29 + [False]


def test_vectors_of_nan_and_infinity_stay_in_to_be_found() -> None:
    vectors = torch.ones(6, 2)
    vectors[1, 0], vectors[2, 1] = float("nan"), float("inf")
    assert usual_vectors(vectors).all()


def test_vectors_that_are_all_zero_are_usual() -> None:
    assert usual_vectors(torch.zeros(4, 3)).all()


@given(st.integers(0, 2**16), st.integers(1, 20))
def test_a_length_counts_and_no_direction(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, 3, generator=generator) * torch.rand(count, 1, generator=generator) ** -1
    lengths = sorted(float(row.norm()) for row in vectors)
    median = lengths[(count - 1) // 2]
    expected = [not float(row.norm()) > LONGEST * median for row in vectors]
    assert usual_vectors(vectors).tolist() == expected
    assert usual_vectors(vectors[:, [2, 0, 1]] * -1).tolist() == expected


def test_layers_that_share_a_bias_get_one_each_and_others_keep_theirs() -> None:
    net: Any = nn.Sequential(nn.Linear(2, 3), nn.Conv1d(2, 3, 1), nn.Linear(2, 3, bias=False), nn.Linear(2, 3))
    net[1].bias = net[0].bias
    own, last = net[0].bias, net[3].bias
    own_biases(net)
    assert net[0].bias is own
    assert net[1].bias is not own
    assert net[1].bias.equal(own)
    assert net[2].bias is None
    assert net[3].bias is last


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (5, 4)), (nn.Linear(4, 3), (5, 6, 4)), (nn.Linear(4, 3), (4,)),
        (nn.Conv1d(2, 3, 1), (5, 2, 7)), (nn.Conv1d(2, 3, 1), (2, 7)), (nn.Conv2d(2, 3, 1), (5, 2, 4, 4)),
        (nn.Conv3d(2, 3, 1), (2, 4, 4, 4)), (nn.ConvTranspose2d(2, 3, 1), (2, 4, 5)),
        (nn.ConvTranspose3d(2, 3, 1), (5, 2, 4, 4, 4)),
    ],
)  # fmt: skip
def test_channels_of_an_output_are_found_with_and_without_a_batch(layer: Any, shape: tuple[int, ...]) -> None:
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1e4, 2e4, 3e4]))
        output = layer(torch.randn(shape))
    rows = by_channel(output, channel_axis_of_output(layer, output))
    torch.testing.assert_close(rows / 1e4, torch.tensor([1.0, 2, 3]).expand_as(rows), rtol=0.01, atol=0.01)
