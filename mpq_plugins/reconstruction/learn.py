"""One block: its rounding, and what is learned along with it, on samples of its own inputs."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..common.text import what_it_said
from ..errors import MPQError, SettingError
from ..models.tracing import CONVOLUTIONS
from .activations import ActivationRange
from .adaround import Rounding, beta_at, soft_weights, undecided
from .capture import first_tensor
from .collect import close
from .samples import Sample, Samples
from .settings import Settings

NORMS_LR = 1e-3  # biases and norms, Adam
RANGES_LR = 5e-4  # logarithms of activation scales
LOOK_EVERY = 50  # steps between looks at the loss, and words of progress


@dataclass(frozen=True)
class Block:
    """A module of the quantized net and what is learned in it; names are parameters' own, inside the block.

    norms: floating-point parameters that are learned along; ranges: of layers' inputs, by their quantizers' names.
    """

    name: str
    module: nn.Module
    layers: tuple[str, ...]
    roundings: Mapping[str, Rounding]
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    ranges: Mapping[str, ActivationRange] = field(default_factory=dict)

    def run(self, tensors: Mapping[str, Tensor], sample: Sample) -> Tensor:
        """The block's output with these tensors in place of its own. Raises SettingError where it fails."""
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}  # which a forward may change
        with _naming(self.name):
            output = functional_call(self.module, {**buffers, **tensors}, sample.args, sample.kwargs)
        return first_tensor(output, self.name)

    def fixed(self, rounded: bool) -> dict[str, Tensor]:
        """Its tensors as learned so far, or rounded to nearest with all else as it began."""
        weights = {name: held.rounded() if rounded else held.to_nearest() for name, held in self.roundings.items()}
        others = (
            self.learned_floats() if rounded else {f"{name}.scale": held.first for name, held in self.ranges.items()}
        )
        return {**weights, **others, **{f"{name}.zero_point": held.zero_point for name, held in self.ranges.items()}}

    def learned_floats(self) -> dict[str, Tensor]:
        """What is learned besides the rounding."""
        return {**self.norms, **{f"{name}.scale": input_range.scale() for name, input_range in self.ranges.items()}}

    @property
    def channel_axis(self) -> int:
        """Of its output: 1 after convolutions, else the last."""
        last = self.module.get_submodule(inner_name(self.layers[-1], self.name))
        return 1 if isinstance(last, CONVOLUTIONS) else -1


@dataclass(frozen=True)
class Learned:
    """Tensors of the block by their names in it; mean losses rounded to nearest and as learned, the better one kept."""

    tensors: dict[str, Tensor]
    nearest: float
    learned: float
    changed: int


def learn(
    block: Block, samples: Samples, settings: Settings, generator: torch.Generator, said: Callable[[int], None]
) -> Learned:
    """Adam on the block's error and the regulariser. Raises SettingError, naming the block, where the loss is NaN."""
    samples = _in_best_format(block, samples)
    before = mean_loss(block, samples, block.fixed(rounded=False))
    _require_finite(block.name, before, 0)
    optimizer = torch.optim.Adam(_parameters(block, settings.lr), fused=True)
    for step in range(settings.steps):
        sample = samples.draw(settings.batch_size, settings.mix, generator)
        weights, h = soft_weights(block.roundings)
        output = block.run({**weights, **block.learned_floats()}, sample)
        loss = _loss(output, sample, block.channel_axis)
        if not loss.requires_grad:
            raise SettingError(
                f"block {block.name!r}: its output does not depend on its weights; name others (blocks=)"
            )
        beta = beta_at(step, settings.steps)
        if beta is not None and settings.regulariser:
            loss = loss + settings.regulariser * undecided(h, beta)
        with _naming(block.name):
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        if step % LOOK_EVERY == 0:
            said(step)
            _require_finite(block.name, float(loss.detach()), step)
    after = mean_loss(block, samples, block.fixed(rounded=True))
    _require_finite(block.name, after, settings.steps)
    better = after < before
    kept = {name: tensor.detach().clone() for name, tensor in block.fixed(rounded=better).items()}
    changed = sum(rounding.changed() for rounding in block.roundings.values()) if better else 0
    return Learned(kept, before, min(after, before), changed)


@torch.no_grad()
def mean_loss(block: Block, samples: Samples, tensors: Mapping[str, Tensor]) -> float:
    """Of all samples, without the regulariser."""
    total = count = 0.0
    for sample in samples.in_order():
        total += float(_loss(block.run(tensors, sample), sample, block.channel_axis)) * sample.count
        count += sample.count
    return total / count


@torch.no_grad()
def _in_best_format(block: Block, samples: Samples) -> Samples:
    """Images channels last, a fifth faster on a CPU, where the block takes them so and gives the same."""
    if not any(isinstance(module, nn.Conv2d) for module in block.module.modules()):
        return samples
    tensors, faster = block.fixed(rounded=False), replace(samples, channels_last=True)
    try:
        plain, laid_out = (block.run(tensors, next(one.in_order())) for one in (samples, faster))
    except SettingError:
        return samples  # a user's module may insist on one format
    return faster if close(laid_out, plain) else samples


def _loss(output: Tensor, sample: Sample, axis: int) -> Tensor:
    """Squared error, summed over channels and averaged over the rest."""
    channels = output.shape[axis if axis < output.dim() else -1]
    scale = channels / max(1, output.numel())
    if sample.importance is None:
        return F.mse_loss(output, sample.target, reduction="sum") * scale
    return ((output - sample.target).square() * sample.importance).sum() * scale


def _parameters(block: Block, lr: float) -> list[dict[str, Any]]:
    groups = [
        (lr, [held.v for held in block.roundings.values()]),
        (NORMS_LR, list(block.norms.values())),
        (RANGES_LR, [held.change for held in block.ranges.values()]),
    ]
    return [{"params": parameters, "lr": rate} for rate, parameters in groups if parameters]


@contextmanager
def _naming(block: str) -> Iterator[None]:
    """Turn what a user's module, or torch, raises on the way into an error that names the block."""
    try:
        yield
    except MPQError:
        raise
    except Exception as error:
        raise SettingError(
            f"block {block!r}: cannot be learned ({what_it_said(error)}); name others (blocks=), or leave its layers "
            "out of the plan; where memory is short, a smaller batch_size"
        ) from error


def _require_finite(name: str, loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise SettingError(
            f"block {name!r}: its loss is {loss} after {step} steps; a smaller lr, or look at the batches. Finished "
            "blocks are kept in the store, if there is one"
        )


def inner_name(name: str, outer: str) -> str:
    """A module's or parameter's name inside a block; of the block itself, nothing."""
    return "" if name == outer else name.removeprefix(f"{outer}.")
