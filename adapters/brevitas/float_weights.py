"""The float weights and biases of a Brevitas model, which tuning begins at and compares with.

They are there as long as nobody has trained or loaded the model since it was converted: a mark of each layer's weight
and bias tells. What tuning replaces is kept beside, out of the state dict.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import SettingError

from .read import is_quantized, weight_codes

WEIGHT = "weight_orig"  # Brevitas's name for the float weights that it looks at with quantization switched off
BIAS = "bias_orig"
MARK = "mpq_mark"


def mark(model: nn.Module) -> None:
    """Note that every quantized layer's weight and bias are as the conversion or a tuning has left them."""
    for module in model.modules():
        if is_quantized(module):
            module.register_buffer(MARK, _mark(module), persistent=False)


def forget(model: nn.Module) -> None:
    """The weights come from elsewhere now: there are no float ones to go back to."""
    for module in model.modules():
        if is_quantized(module):
            for name in (WEIGHT, BIAS):
                module._buffers.pop(name, None)
            module.register_buffer(MARK, torch.zeros(2, dtype=torch.int64), persistent=False)


def require_float(model: nn.Module, what: str) -> None:
    """Raise SettingError, naming layers, where weights or biases have been trained, loaded or rounded since."""
    gone = [
        repr(name) for name, module in model.named_modules() if is_quantized(module) and not _has_float_weight(module)
    ]
    if gone:
        raise SettingError(
            f"{what}: the float weights of {first_few(gone, ', ')} are gone, for they were trained, loaded or rounded "
            "since the conversion. Convert the float model anew"
        )


def begin_at_float(layers: Mapping[str, nn.Module]) -> None:
    """Put float weights, and biases as they were before any correction, back in their places; keep them beside."""
    for module in layers.values():
        weight = cast(Tensor, module.weight)
        if WEIGHT in module._buffers:
            weight.data.copy_(cast(Tensor, module._buffers[WEIGHT]))
        else:
            module.register_buffer(WEIGHT, weight.detach().clone(), persistent=False)
        begin_at_own_bias(module)


def begin_at_own_bias(module: nn.Module) -> None:
    """Undo an earlier correction of a layer's bias, or keep its bias for that."""
    bias = cast("Tensor | None", getattr(module, "bias", None))
    if BIAS not in module._buffers:
        kept = torch.empty(0) if bias is None else bias.detach().clone()
        module.register_buffer(BIAS, kept, persistent=False)
        return
    kept = cast(Tensor, module._buffers[BIAS])
    if kept.numel() == 0:
        module._parameters["bias"] = None
    elif bias is not None:
        bias.data.copy_(kept)


def _has_float_weight(module: nn.Module) -> bool:
    noted = module._buffers.get(MARK)
    if noted is not None:
        return bool(noted.cpu().equal(_mark(module).cpu()))
    # Converted by the user's own call: weights on their grid have been rounded.
    weight = cast(Tensor, module.weight)
    return not weight_codes(module).value.reshape(weight.shape).equal(weight)


def _mark(module: nn.Module) -> Tensor:
    """A sum over the bits of the weight and one over those of the bias, each bit's place weighed in, int64 (2,)."""
    bias = cast("Tensor | None", getattr(module, "bias", None))
    return torch.stack([_sum(cast(Tensor, module.weight)), torch.tensor(1) if bias is None else _sum(bias)])


def _sum(values: Tensor) -> Tensor:
    words = values.detach().float().contiguous().view(torch.int32).flatten().long().cpu()
    return (words * torch.arange(1, 2 * words.numel(), 2)).sum()  # wrapping around
