"""Second moments of layers' inputs: how much each weight's error counts at the layer's output."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batches import call_model, first_input, sample_count
from ..errors import SettingError
from ..weights import layer_kind

TRANSPOSED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}

Said = Callable[[int, int], None]


def second_moments(
    model: nn.Module, modules: Mapping[str, Sequence[nn.Module]], batches: Sequence[Any], said: Said | None = None
) -> dict[str, Tensor]:
    """h_j = 1/N sum_n,p x_npj^2 over samples n and output positions p, by layer, in the weight's shape, float32.

    modules: those that use a layer's weight, by layer. Raises SettingError, naming the layer, where no batch reaches
    it.
    """
    sums: dict[str, Tensor] = {}
    handles = []
    for name, users in modules.items():
        for module in users:

            def hook(own: nn.Module, args: tuple[Any, ...], kwargs: Any, _: Any, name: str = name) -> None:
                sums[name] = sums.get(name, 0) + _squares_seen(own, first_input(args, kwargs))

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    samples = 0
    try:
        for position, batch in enumerate(batches):
            if said is not None:
                said(position, len(batches))
            with torch.no_grad():
                call_model(model, batch)
            samples += sample_count(batch)
    finally:
        for handle in handles:
            handle.remove()
    if said is not None:
        said(len(batches), len(batches))
    for name in modules:
        if name not in sums:
            raise SettingError(
                f"layer {name!r}: no batch reaches it, so its inputs are not known; give some that do, or skip it"
            )
    return {name: total / samples for name, total in sums.items()}


def weight_users(model: nn.Module, weight: Tensor) -> list[nn.Module]:
    """The layers whose weight this is."""
    return [
        module
        for module in model.modules()
        if layer_kind(module) is not None
        and isinstance(own := getattr(module, "weight", None), Tensor)
        and own.data_ptr() == weight.data_ptr()
    ]


def _squares_seen(module: nn.Module, x: Tensor) -> Tensor:
    """sum_n,p x_npj^2 for every weight: the gradient of the layer's summed output on x^2 says just that."""
    weight = torch.zeros_like(module.weight, dtype=torch.float32, requires_grad=True)  # type: ignore[arg-type]
    given = x.detach() if isinstance(module, nn.Embedding) else x.detach().float().square()
    with torch.enable_grad():
        total = _output(module, given, weight).sum()
    (gradient,) = torch.autograd.grad(total, weight)
    return gradient


def _output(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return F.linear(x, weight)
    if isinstance(module, nn.Embedding):
        return F.embedding(x, weight)
    for kind, function in TRANSPOSED.items():
        if isinstance(module, kind):
            return function(
                x, weight, None, module.stride, module.padding, module.output_padding, module.groups, module.dilation
            )
    result: Tensor = module._conv_forward(x, weight, None)
    return result
