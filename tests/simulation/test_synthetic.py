"""Synthetic inputs have the statistics that BatchNorm stored, whatever they start from."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import synthetic_batches
from mpq_plugins.errors import SettingError
from mpq_plugins.models.tracing import BATCH_NORMS

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Sequential:
    """With statistics far from those of noise."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8))
    made = nn.Sequential(*layers).train()
    images = nn.functional.avg_pool2d(torch.randn(256, 3, 16, 16), 3, 1, 1) * 3 + 0.5
    with torch.no_grad():
        for _ in range(40):
            made(images)
    return made.eval()


def mismatch(model: nn.Module, inputs: Tensor) -> float:
    """The objective in plain loops and float64."""
    total = 0.0

    def add(module: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal total
        for c in range(len(module.running_mean)):
            values, sigma = args[0][:, c].double(), float(module.running_var[c]) ** 0.5
            total += float(((values.mean() - module.running_mean[c]) / sigma) ** 2) / len(module.running_mean)
            total += float((values.std(correction=0) / sigma - 1) ** 2) / len(module.running_mean)

    handles = [m.register_forward_pre_hook(add) for m in model.modules() if isinstance(m, BATCH_NORMS)]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return total


def test_every_batch_gets_near_the_statistics() -> None:
    model = net()
    noise = synthetic_batches(model, (64, 3, 16, 16), count=2, steps=0)
    moved = synthetic_batches(model, (64, 3, 16, 16), count=2)
    for before, after in zip(noise, moved, strict=True):
        assert mismatch(model, after) < 0.05 * mismatch(model, before)


class Counted(nn.Module):
    """It counts the samples of its calls; its copies count in the same list."""

    calls: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        out: Tensor = self.inner(x)
        return out


def test_groups_after_the_first_take_a_quarter_of_the_steps() -> None:
    Counted.calls.clear()
    synthetic_batches(Counted().eval(), (128, 3, 8, 8), count=2, steps=40)
    moved = 40 + 3 * 10  # steps of the four groups of 64
    assert moved < Counted.calls.count(64) < moved + 10  # and some that look how near a mix is


def test_no_two_samples_are_alike() -> None:
    """Those that start from others, too."""
    samples = torch.cat(synthetic_batches(net(), (40, 3, 16, 16), count=3)).flatten(1)
    apart = torch.cdist(samples, samples) / samples.norm(dim=1).mean()
    assert apart[~torch.eye(len(samples), dtype=torch.bool)].min() > 0.2


def test_a_seed_gives_the_same_inputs_and_another_does_not() -> None:
    def made(seed: int) -> Tensor:
        return torch.cat(synthetic_batches(net(), (65, 3, 8, 8), count=2, steps=8, seed=seed))

    assert made(1).equal(made(1))
    assert not made(1).equal(made(2))


def test_the_model_is_not_changed() -> None:
    model = net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    synthetic_batches(model, (64, 3, 8, 8), count=1, steps=2)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "shape", [(16, 3, 8, 8), (64, 3, 8, 8), (65, 3, 8, 8), (4, 3, 8, 8), (1, 3, 8, 8), (9, 3, 3, 1)]
)
def test_progress_goes_up_to_one_total(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    seen: list[tuple[int, int]] = []
    made = synthetic_batches(model, shape, count=3, steps=5, progress=lambda _, done, total: seen.append((done, total)))
    assert [tuple(batch.shape) for batch in made] == [shape] * 3
    done = [one for one, _ in seen]
    assert len({total for _, total in seen}) == 1
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, seen[0][1])


class Scrambled(nn.Module):
    """Its BatchNorm sees a product of parts far apart, so that mixes are no nearer than noise."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.norm.running_mean = torch.tensor([40.0])

    def forward(self, x: Tensor) -> Tensor:
        halves = x.flatten(1).chunk(2, dim=1)
        out: Tensor = self.norm((halves[0] * halves[1]).sum(1, keepdim=True))
        return out


def test_where_a_mix_is_not_near_a_group_starts_from_noise_and_gets_near_too() -> None:
    model = Scrambled().eval()
    noise = synthetic_batches(model, (32, 1, 8), count=3, steps=0)
    moved = synthetic_batches(model, (32, 1, 8), count=3)
    for before, after in zip(noise, moved, strict=True):
        assert mismatch(model, after) < 0.05 * mismatch(model, before)
        assert (after - before).square().mean() < 2 * 4  # twice the spread of noise: it is this noise that was moved


def test_a_model_made_for_one_size_of_batch() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(x.view(96, 3, 4, 4))
            return out

    (made,) = synthetic_batches(Fixed().eval(), (96, 3, 4, 4), count=1)
    assert made.mean((0, 2, 3)).abs().max() < 0.02


def test_a_norm_that_is_called_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.norm.running_mean = torch.full((4,), 1.0)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(input=x)
            return out

    (made,) = synthetic_batches(Named().eval(), (32, 4), count=1)
    torch.testing.assert_close(made.mean(0), torch.full((4,), 1.0), rtol=0, atol=0.1)


def test_norms_that_are_not_reached_say_so() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(SettingError, match="BatchNorms tell nothing of its inputs"):
        synthetic_batches(Past().eval(), (32, 4), count=1)
