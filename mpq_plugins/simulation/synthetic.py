"""Calibration inputs made of the model alone, for where there are no data.

Gaussian noise x, moved by Adam so that the inputs of every BatchNorm get the statistics that it stored:

    minimise over x   sum_l mean_c ((mu_lc(x) - running_mean_lc) / s_lc)^2 + mean_c (sigma_lc(x) / s_lc - 1)^2

s = sqrt(running_var), mu and sigma the batch's own (ZeroQ, Cai et al. 2020, arXiv 2001.00281, eq. 4).

The time is samples times steps. Samples meet in mu and sigma alone, so a group of some of them is moved at a time. Only
the first group needs every step from noise. Each of the next starts from the one before it: every sample is cut in two
and joined with the other part of a neighbour, which leaves the statistics nearly as they were. On ResNet-20 noise is at
14.5, and 45 steps bring it to 0.32. A mix starts at 0.44, and 12 steps bring it to 0.30. Where a mix is not that near,
a group starts from noise too.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import listed, shown
from ..common.progress import Progress, check_callbacks
from ..errors import SettingError
from ..models.arguments import check_module
from ..models.copying import duplicate
from ..models.running import call_model, evaluating, first_input, outside_inference_mode
from ..models.tracing import BATCH_NORMS
from .batch_statistics import batch_statistics

LEAST_SIGMA = 1e-3
MOST_VALUES = 1 << 30  # 4 GiB as float32
SHAPES = "samples, then one input's shape, as in 128,3,32,32"
GROUP = 64  # samples that are moved at a time; where all come of 32, the seed matters more
LEAST_MIXED = 8  # samples, for the mixes of fewer are much like one another
NEAR = 0.25  # a mix's mismatch, at most, for each of the noise's


@dataclass(frozen=True)
class _Start:
    """How Adam moves what starts from this."""

    rate: float  # at first; it falls to 0
    share: float  # of the steps

    def steps(self, steps: int) -> int:
        return math.ceil(steps * self.share)

    def rate_at(self, done: float) -> float:
        return self.rate * (1 - done)


NOISE = _Start(rate=0.2, share=1)
MIX = _Start(rate=0.05, share=0.25)
BETAS = (0.8, 0.99)  # of Adam; fewer steps do than with (0.9, 0.999), which remembers gradients of long ago


@outside_inference_mode()
def synthetic_batches(
    model: nn.Module,
    shape: Sequence[int],
    count: int = 4,
    *,
    steps: int = 45,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Make float batches of inputs from the model alone, for `correct` and `sensitivity`.

    ZeroQ (arXiv 2001.00281, eq. 4): noise is moved until the inputs of every BatchNorm have the statistics that it
    stored.

    Args:
        model: The model; it is not changed.
        shape: The shape of a batch, samples first.
        count: How many batches.
        steps: Of Adam, from noise; inputs that start from others take fewer. 0 leaves plain noise.
        seed: The same seed gives the same inputs.
        progress: Called with "", steps done and steps in all.

    Returns:
        The batches.

    Raises:
        SettingError: The shape is none, or the model does not run on it; or the model has no BatchNorm statistics, and
            so says nothing of its inputs.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8)).eval()
        >>> batches = mpq.synthetic_batches(net, (16, 8), count=2, steps=3)
        >>> [tuple(batch.shape) for batch in batches]
        [(16, 8), (16, 8)]
    """
    check_module(model)
    check_callbacks(progress=progress)
    for name, value, least in (("count", count, 1), ("steps", steps, 0), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            raise SettingError(f"{name}: {shown(value)} is not allowed; an integer from {least} up")
    sides = tuple(listed("shape", shape, SHAPES))
    if len(sides) < 2 or not all(type(n) is int and n > 0 for n in sides):
        raise SettingError(f"shape: {shown(sides)} is not allowed; {SHAPES}")
    if math.prod(sides) > MOST_VALUES:
        raise SettingError(f"shape: {sides!r} is {math.prod(sides):,} values; at most {MOST_VALUES:,}")
    copied = duplicate(model)
    norms: list[Any] = [m for m in copied.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None]
    if not norms:
        raise SettingError(
            f"{type(model).__name__}: has no BatchNorm with statistics, so nothing tells what its inputs are like; "
            "give calibration batches"
        )
    if not all(bool(m.running_mean.isfinite().all() and (m.running_var >= 0).all()) for m in norms):
        raise SettingError(f"{type(model).__name__}: a BatchNorm holds NaN, infinite or negative statistics; repair it")
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(sides, generator=generator, dtype=torch.float32) for _ in range(count)]
    with evaluating(copied):
        with torch.no_grad():
            call_model(copied, batches[0])
        if steps:
            groups = [group for batch in batches for group in batch.tensor_split(_groups(copied, batch))]
            _move(copied, norms, groups, steps, generator, progress)
        elif progress is not None:
            progress("", 0, 0)
    return batches


def _groups(model: nn.Module, batch: Tensor) -> int:
    """How many groups a batch makes. Without positions a sample is one value of a statistic, and a few are too few."""
    groups = math.ceil(len(batch) / GROUP) if batch.dim() > 2 else 1
    if groups > 1:
        try:
            with torch.no_grad():
                call_model(model, batch.tensor_split(groups)[-1])
        except SettingError:  # it is made for one size of batch
            return 1
    return groups


def _move(
    model: nn.Module,
    norms: Sequence[Any],
    groups: Sequence[Tensor],
    steps: int,
    generator: torch.Generator,
    progress: Progress | None,
) -> None:
    """Move the groups of noise in place."""
    mixes = min(map(len, groups)) >= LEAST_MIXED and any(size > 1 for size in groups[0].shape[2:])
    planned = [(MIX if mixes and position else NOISE).steps(steps) for position in range(len(groups))]
    with torch.no_grad():
        far = _mismatch(model, norms, groups[0])
    for position, group in enumerate(groups):
        start, done = NOISE, sum(planned[:position])
        if mixes and position:
            mixed = _mixed(groups[position - 1], len(group), generator)
            with torch.no_grad():
                near = bool(_mismatch(model, norms, mixed) <= NEAR * far)
            if near:
                start = MIX
                group.copy_(mixed)
        report = _reporter(progress, done, planned[position], sum(planned))
        group.copy_(_moved(model, norms, group.clone(), start, start.steps(steps), report))


def _mixed(group: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many samples, each joined of two at a place of its own along one of the axes of positions."""
    axes = [axis for axis in range(2, group.dim()) if group.shape[axis] > 1]
    axis = axes[int(torch.randint(len(axes), (), generator=generator))]
    size = group.shape[axis]
    cuts = torch.randint(max(1, size // 4), size - size // 4, (count,), generator=generator)
    shape = [1] * group.dim()
    shape[0], shape[axis] = count, size
    before = (torch.arange(size) < cuts[:, None]).view(shape)
    first = torch.arange(count) % len(group)
    second = (first + int(torch.randint(1, len(group), (), generator=generator))) % len(group)
    return torch.where(before, group[first], group[second])


def _reporter(progress: Progress | None, before: int, planned: int, total: int) -> Callable[[float], None]:
    """Tell the share that is done of a group, whose steps may be more than were planned."""
    return lambda done: progress("", before + int(planned * done), total) if progress is not None else None


def _moved(
    model: nn.Module,
    norms: Sequence[Any],
    inputs: Tensor,
    start: _Start,
    steps: int,
    report: Callable[[float], None],
) -> Tensor:
    inputs.requires_grad_(True)
    optimizer = torch.optim.Adam([inputs], lr=start.rate, betas=BETAS)
    for step in range(steps):
        report(step / steps)
        optimizer.param_groups[0]["lr"] = start.rate_at(step / steps)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = _mismatch(model, norms, inputs)
        if not loss.requires_grad:
            raise SettingError(
                f"{type(model).__name__}: its BatchNorms tell nothing of its inputs (none is reached, or its forward "
                "switches gradients off); give calibration batches, or steps=0 for plain noise"
            )
        loss.backward()
        optimizer.step()
    report(1)
    return inputs.detach()


def _mismatch(model: nn.Module, norms: Sequence[Any], inputs: Tensor) -> Tensor:
    terms = [inputs.new_zeros(())]
    with _hooked(norms, lambda norm, values: terms.append(_distance(norm, values))):
        call_model(model, inputs)
    return torch.stack(terms).sum()


def _distance(norm: Any, values: Tensor) -> Tensor:
    """Of a BatchNorm's input from the statistics that it stored."""
    mean, variance = batch_statistics(values, norm.running_mean)
    sigma = norm.running_var.sqrt() + LEAST_SIGMA
    spread = (variance + LEAST_SIGMA**2).sqrt()
    distance: Tensor = ((mean - norm.running_mean) / sigma).square().mean() + (spread / sigma - 1).square().mean()
    return distance


@contextmanager
def _hooked(norms: Sequence[Any], seen: Callable[[Any, Tensor], None]) -> Iterator[None]:
    """Show every input of the BatchNorms."""
    handles = [
        norm.register_forward_pre_hook(
            lambda module, args, kwargs: seen(module, first_input(args, kwargs)), with_kwargs=True
        )
        for norm in norms
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
