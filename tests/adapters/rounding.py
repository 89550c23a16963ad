"""What 8 bits in and out of every planned layer cost, by a formula of its own."""

import warnings

import torch
from torch import Tensor, nn

from mpq_plugins import Plan, apply

Outputs = tuple[Tensor, ...]


def simulations(net: nn.Module, plan: Plan, images: Tensor) -> tuple[Outputs, Outputs]:
    """What `apply` gives, and what it gives with 8 bits in and out of every planned layer, by a formula of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact, rough = apply(net, plan), apply(net, plan)
    round_activations(rough, plan)
    with torch.no_grad():
        return outputs(exact(images.clone())), outputs(rough(images.clone()))


def outputs(given: Tensor | Outputs) -> Outputs:
    return (given,) if isinstance(given, Tensor) else given


def round_activations(net: nn.Module, plan: Plan) -> None:
    """Have every planned layer round what it is given, and what it gives."""
    for name in plan.by_name:
        module = net.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, args, kwargs: (tuple(map(rounded, args)), {key: rounded(x) for key, x in kwargs.items()}),
            with_kwargs=True,
        )
        module.register_forward_hook(lambda _, __, output: rounded(output))


def rounded(values: Tensor) -> Tensor:
    """256 levels from the least to the greatest, 0 among them."""
    low, high = values.min().clamp(max=0), values.max().clamp(min=0)
    step = ((high - low) / 255).clamp_min(1e-9)
    zero = (-low / step).round()
    return ((values / step).round() + zero).clamp(0, 255).sub(zero) * step


def distances(found: Outputs, expected: Outputs) -> list[float]:
    return [float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(found, expected, strict=True)]
