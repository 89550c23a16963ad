"""What a Brevitas layer holds now: its weight's codes and grid, and how it takes its input."""

from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpq_plugins.models.input_ranges import InputRange
from mpq_plugins.plans.activations import Activations
from mpq_plugins.plans.layers import LayerChoice

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


def planned_inputs(module: nn.Module) -> Activations:
    """How the plan that a layer was made by quantizes its input, which it does."""
    widths = bit_widths(module)
    assert widths is not None
    activations = _choice(bytes(widths.choice.tolist())).activations
    assert activations is not None
    return activations


def input_range(module: nn.Module) -> InputRange | None:
    """The range of a layer's quantized input, as Brevitas computes with it; None for floating point."""
    bits = input_bits(module)
    if bits is None or not is_calibrated(module):
        return None
    proxy = cast(Any, module).input_quant
    return InputRange(bits, float(proxy.scale().detach()), int(proxy.zero_point().detach()))


def set_input_range(module: nn.Module, own: InputRange) -> None:
    """Have a layer's input quantized in a range, which tuning may learn on from."""
    quantizer = cast(Any, module).input_quant.fused_activation_quant_proxy.tensor_quant
    scaling, shift = quantizer.scaling_impl, quantizer.zero_point_impl
    with torch.no_grad():
        scaling.value.fill_(own.scale * (2**own.bits - 1))
        shift.value.fill_(own.scale * own.zero_point)
    for part in (scaling, shift):
        part.counter = part.collect_stats_steps + 1


def is_calibrated(module: nn.Module) -> bool:
    """Whether a layer's input quantizer has seen data, or has no range to learn."""
    quantizer = cast(Any, module).input_quant.fused_activation_quant_proxy.tensor_quant
    return bool(getattr(quantizer.scaling_impl, "counter", 1) > 0)


@cache
def _choice(document: bytes) -> LayerChoice:
    return LayerChoice.model_validate_json(document)


def input_quantizers(model: nn.Module) -> list[str]:
    """The layers that quantize their inputs."""
    return [name for name, module in model.named_modules() if input_bits(module) is not None]
