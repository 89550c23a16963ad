"""Second moments of layers' inputs: how much each weight's error counts at the layer's output."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingError
from ..models.autocast import own_arithmetic
from ..models.folding import borrowed_weights
from ..models.kinds import is_transformers_conv1d, layer_kind
from ..models.plain import is_plain
from ..models.running import call_model, first_input, sample_count
from ..plans.names import weight_name
from .own_output import squared_slopes, watching

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

    modules: those that use a layer's weight, by layer. For modules that are not torch's own, h is the squared slope of
    their own output (own_output.py). Raises SettingError, naming the layer, where no batch reaches it, or where
    something else uses its weight too.
    """
    refuse_borrowed(model, modules)
    sums: dict[str, Tensor] = {}
    names = {module: name for name, users in modules.items() for module in users}
    plain = {module: is_plain(module) or is_transformers_conv1d(module) for module in names}

    def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        moment = (
            _squares_seen(module, first_input(args, kwargs)) if plain[module] else squared_slopes(module, args, kwargs)
        )
        sums[names[module]] = sums.get(names[module], 0) + moment

    samples = 0
    with watching(list(names), seen):
        for position, batch in enumerate(batches):
            if said is not None:
                said(position, len(batches))
            with torch.no_grad():
                call_model(model, batch)
            samples += sample_count(batch)
    if said is not None:
        said(len(batches), len(batches))
    for name in modules:
        if name not in sums:
            raise SettingError(
                f"layer {name!r}: no batch reaches it, so its inputs are not known; give some that do, or skip it"
            )
    return {name: total / samples for name, total in sums.items()}


def refuse_borrowed(model: nn.Module, modules: Mapping[str, Sequence[nn.Module]]) -> None:
    """Raise SettingError, naming the layer, where something else than these modules uses its weight."""
    borrowed = borrowed_weights(model)
    users = {id(module): name for name, users in modules.items() for module in users}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in users and weight_name(path) in borrowed:
            raise SettingError(
                f"layer {users[id(module)]!r}: a functional call uses its weight too, so its own inputs do not tell "
                "what an error in it does; use a sensitivity of the whole network (kl, distance, fisher), or skip it"
            )


def weight_users(model: nn.Module, weight: Tensor) -> list[nn.Module]:
    """The layers whose weight this is."""
    return [
        module
        for module in model.modules()
        if layer_kind(module) is not None
        and isinstance(held := getattr(module, "weight", None), Tensor)
        and held.data_ptr() == weight.data_ptr()
    ]


@own_arithmetic()
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
    if is_transformers_conv1d(module):
        return x @ weight
    for kind, function in TRANSPOSED.items():
        if isinstance(module, kind):
            return function(
                x, weight, None, module.stride, module.padding, module.output_padding, module.groups, module.dilation
            )
    result: Tensor = module._conv_forward(x, weight, None)
    return result
