"""What a module that is not torch's own does with its bias or its statistics, found by trying it on an input.

Correcting a bias or a BatchNorm's statistics relies on what these do in torch's classes. A user's subclass may do just
that and more, such as an activation after its norm, or something else altogether; one call tells.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .running import first_input, own_copy

CLOSE = 1e-3  # of the largest value: what float32 leaves of equal results


def adds_its_bias(layer: nn.Module, axis: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a layer's output moves by what its bias moves by; axis: of the output's channels."""
    bias = layer.bias
    if not isinstance(bias, nn.Parameter):
        return False
    step = torch.linspace(0.5, 1.0, bias.numel(), dtype=torch.float32).to(bias).view_as(bias)
    before, after = (_output(layer, {"bias": value}, args, kwargs) for value in (bias, bias + step))
    if before is None or after is None:
        return False
    shape = [1] * before.dim()
    shape[axis] = -1
    return _equal(after, before + step.view(shape))


def follows_its_statistics(norm: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a norm's output moves with its statistics, and stays the same when its input moves with them."""
    x = first_input(args, kwargs)
    if not isinstance(x, Tensor) or x.dim() < 2 or norm.running_mean is None or norm.running_var is None:
        return False
    mean, var = norm.running_mean, norm.running_var
    shape = [1, -1] + [1] * (x.dim() - 2)
    other_mean, other_var = mean + var.sqrt(), 2 * var + norm.eps  # so that var + eps doubles
    moved = (x - mean.view(shape)) * 2**0.5 + other_mean.view(shape)
    other = {"running_mean": other_mean, "running_var": other_var}
    before = _output(norm, {"running_mean": mean, "running_var": var}, args, kwargs)
    alone = _output(norm, other, args, kwargs)
    first = {} if args else {next(iter(kwargs)): moved}
    together = _output(norm, other, (moved, *args[1:]) if args else (), {**kwargs, **first})
    if before is None or alone is None or together is None:
        return False
    return _equal(before, together) and not _equal(before, alone)


def _output(
    module: nn.Module, state: dict[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    with torch.no_grad():
        output = functional_call(module, state, own_copy(args), own_copy(dict(kwargs)))
    return output if isinstance(output, Tensor) else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= CLOSE * a.abs().amax()).all())
