"""Calibration inputs made of the model alone, for where there are no data.

Gaussian noise x, moved by Adam so that the inputs of every BatchNorm get the statistics that it stored:

    minimise over x   sum_l mean_c ((mu_lc(x) - running_mean_lc) / s_lc)^2 + mean_c (sigma_lc(x) / s_lc - 1)^2

s = sqrt(running_var), mu and sigma the batch's own (ZeroQ, Cai et al. 2020, arXiv 2001.00281, eq. 4).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.progress import Progress
from ..errors import SettingError
from ..models.copying import duplicate
from ..models.running import call_model, evaluating
from ..models.tracing import BATCH_NORMS

RATE = 0.1
LEAST_SIGMA = 1e-3
MOST_VALUES = 1 << 30  # 4 GiB as float32


def synthetic_batches(
    model: nn.Module,
    shape: Sequence[int],
    count: int = 4,
    *,
    steps: int = 60,
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
        steps: Of Adam; 0 leaves plain noise.
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
    for name, value, least in (("count", count, 1), ("steps", steps, 0), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            raise SettingError(f"{name}: {value!r} is not allowed; an integer from {least} up")
    if isinstance(shape, int) or len(shape) < 2 or not all(type(n) is int and n > 0 for n in shape):
        raise SettingError(
            f"shape: {tuple(shape)!r} is not allowed; samples, then one input's shape, as in 128,3,32,32"
        )
    if math.prod(shape) > MOST_VALUES:
        raise SettingError(f"shape: {tuple(shape)!r} is {math.prod(shape):,} values; at most {MOST_VALUES:,}")
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
    made = []
    with evaluating(copied):
        for position in range(count):
            noise = torch.randn(tuple(shape), generator=generator)
            with torch.no_grad():
                call_model(copied, noise)
            report = _reporter(progress, position * steps, count * steps)
            made.append(_moved(copied, norms, noise, steps, report))
    return made


def _reporter(progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    return lambda step: progress("", before + step, total) if progress is not None else None


def _moved(model: nn.Module, norms: Sequence[Any], noise: Tensor, steps: int, report: Callable[[int], None]) -> Tensor:
    inputs = noise.requires_grad_(True)
    optimizer = torch.optim.Adam([inputs], lr=RATE)
    for step in range(steps):
        report(step)
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
    report(steps)
    return inputs.detach()


def _mismatch(model: nn.Module, norms: Sequence[Any], inputs: Tensor) -> Tensor:
    seen: list[tuple[Any, Tensor]] = []
    handles = [norm.register_forward_hook(lambda module, given, _: seen.append((module, given[0]))) for norm in norms]
    try:
        call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    total = inputs.new_zeros(())
    for norm, values in seen:
        over = [axis for axis in range(values.dim()) if axis != 1]
        sigma = norm.running_var.sqrt() + LEAST_SIGMA
        spread = (values.var(over, unbiased=False) + LEAST_SIGMA**2).sqrt()
        total = total + ((values.mean(over) - norm.running_mean) / sigma).square().mean()
        total = total + (spread / sigma - 1).square().mean()
    return total
