"""What a Brevitas layer holds now: its weight's codes and grid, and how it takes its input."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .quantizers import bit_widths


@dataclass(frozen=True)
class WeightCodes:
    """A layer's weight as its Brevitas quantizer gives it now, all in the quantizer's view: groups split off, if any.

    codes: whole numbers; value = (codes - zero_point) scale; bits: of each channel, or one number.
    """

    value: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: Tensor


def weight_codes(module: nn.Module) -> WeightCodes:
    """Read a Brevitas layer's weight: codes, scale, zero point and bits, detached."""
    quantizer = cast(Any, module).weight_quant.tensor_quant
    with torch.no_grad():
        value, scale, zero_point, width = (
            part.detach() if isinstance(part, Tensor) else torch.tensor(part) for part in quantizer(module.weight)
        )
    widths = bit_widths(module)
    codes = torch.round(value / torch.where(scale == 0, 1.0, scale)) + zero_point
    return WeightCodes(value, codes, scale, zero_point, width if widths is None else widths.bits)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module quantizes its weight, now."""
    proxy = getattr(module, "weight_quant", None)
    return proxy is not None and bool(proxy.is_quant_enabled)


def input_bits(module: nn.Module) -> int | None:
    """The bits of a layer's quantized input; None for floating point."""
    proxy = getattr(module, "input_quant", None)
    return int(proxy.bit_width().item()) if proxy is not None and proxy.is_quant_enabled else None


def is_calibrated(module: nn.Module) -> bool:
    """Whether a layer's input quantizer has seen data, or has no range to learn."""
    quantizer = cast(Any, module).input_quant.fused_activation_quant_proxy.tensor_quant
    return bool(getattr(quantizer.scaling_impl, "counter", 1) > 0)


def input_quantizers(model: nn.Module) -> list[str]:
    """The layers that quantize their inputs."""
    return [name for name, module in model.named_modules() if input_bits(module) is not None]
