"""Means, variances and their gradients against torch's own, in float64."""

import pytest
import torch

from mpq_plugins.simulation.batch_statistics import batch_statistics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shape", [(64, 5), (16, 5, 9), (8, 5, 6, 4), (4, 5, 3, 2, 3)])
def test_they_are_torch_s_own_and_so_are_their_gradients(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator) * 2 + 1
    weights = torch.randn(2, 5, generator=generator)
    over = [axis for axis in range(len(shape)) if axis != 1]
    taken, exact = values.clone().requires_grad_(), values.double().requires_grad_()
    mean, variance = batch_statistics(taken, torch.zeros(5))
    expected = exact.mean(over), exact.var(over, correction=0)
    torch.testing.assert_close(mean, expected[0].float())
    torch.testing.assert_close(variance, expected[1].float())
    (weights[0] * mean + weights[1] * variance).sum().backward()
    (weights[0] * expected[0] + weights[1] * expected[1]).sum().backward()
    assert taken.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(taken.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


def test_nothing_cancels_where_the_mean_is_far_from_zero() -> None:
    values = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 1000
    mean, variance = batch_statistics(values, torch.tensor([1000.5, 999.0, 1001.0]))
    torch.testing.assert_close(variance.double(), values.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=0)
    torch.testing.assert_close(mean.double(), values.double().mean((0, 2, 3)), rtol=1e-6, atol=0)


def test_a_channel_that_does_not_vary_has_no_negative_variance() -> None:
    _, variance = batch_statistics(torch.full((16, 2, 3), 0.1), torch.tensor([0.0, 0.3]))
    assert (variance >= 0).all()
    assert (variance < 1e-6).all()
