"""Quantized inputs of layers, in ranges that a model carries along with its weights.

x' = (clamp(round(x / scale) + zero_point, 0, 2^b - 1) - zero_point) scale, one scale and zero point a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.public import public
from ..common.text import first_few
from ..errors import SettingError
from .copying import duplicate

NAME = "input_quantizer"


@public
@dataclass(frozen=True)
class InputRange:
    """One layer's: its input at b bits has the levels (code - zero_point) scale, code in 0 .. 2^b - 1.

    Attributes:
        bits: b.
        scale: The step between two levels, in the input's units.
        zero_point: The code of 0.
    """

    bits: int
    scale: float
    zero_point: int


class InputQuantizer(nn.Module):
    """Quantizes and dequantizes a layer's input; a scale of 0 lets it pass."""

    scale: Tensor
    zero_point: Tensor
    levels: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", torch.zeros(()))
        self.register_buffer("zero_point", torch.zeros(()))
        self.register_buffer("levels", torch.tensor(2**bits))  # so that a state dict says it

    def forward(self, x: Tensor) -> Tensor:
        """x, of any shape, at the levels of its range."""
        return fake_quantize_input(x, self.scale, self.zero_point, self.bits)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"bits={self.bits}"


def fake_quantize_input(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Levels of x. Gradients pass through the rounding (LSQ, Esser et al. 2020, arXiv 1902.08153, eq. 1 to 3)."""
    position = x / scale
    codes = position + (position.round() - position).detach() + zero_point
    return (codes.clamp(0, 2**bits - 1) - zero_point) * scale


def quantize_input(layer: nn.Module, bits: int) -> InputQuantizer:
    """Give a layer an InputQuantizer that lets everything pass; the layer's own, if it has one of that width.

    Raises SettingError where something else has its name, or it has another width.
    """
    known = getattr(layer, NAME, None)
    if isinstance(known, InputQuantizer) and known.bits == bits:
        return known
    if known is not None:
        raise SettingError(f"{type(layer).__name__}: has another {NAME}, {known}; take it away first")
    quantizer = InputQuantizer(bits).to(next(layer.parameters()).device)
    layer.add_module(NAME, quantizer.train(layer.training))
    layer.register_forward_pre_hook(_quantize, with_kwargs=True)
    return quantizer


def input_ranges(source: nn.Module | Mapping[str, Tensor]) -> dict[str, InputRange]:
    """List the ranges of the inputs that a model quantizes, or that its state dict tells of; most have none.

    Args:
        source: A model, or its state dict.

    Returns:
        The ranges by layer name.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> mpq.input_ranges(mpq.with_input_ranges(net, {"0": mpq.InputRange(8, 0.5, 128)}))
        {'0': InputRange(bits=8, scale=0.5, zero_point=128)}
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    tail = f"{NAME}.levels"
    ranges = {}
    for key in (key for key in state if key == tail or key.endswith(f".{tail}")):
        prefix = key.removesuffix("levels")
        layer = prefix.removesuffix(f"{NAME}.").removesuffix(".")
        bits = int(state[key]).bit_length() - 1
        ranges[layer] = InputRange(bits, float(state[f"{prefix}scale"]), int(state[f"{prefix}zero_point"]))
    return ranges


def with_input_ranges(model: nn.Module, ranges: Mapping[str, InputRange]) -> nn.Module:
    """Make a copy of the model whose layers' inputs are quantized in these ranges, in place of any of its own.

    Args:
        model: The model; it is not changed.
        ranges: The ranges by layer name.

    Returns:
        The copy.

    Raises:
        SettingError: The model does not have such a layer, or what is given is no range.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
        >>> _ = torch.nn.init.ones_(net[0].weight)
        >>> mpq.with_input_ranges(net, {"0": mpq.InputRange(8, 0.5, 128)})(torch.tensor([[0.6]])).tolist()
        [[0.5]]
    """
    odd = [
        repr(name)
        for name, input_range in ranges.items()
        if not isinstance(input_range, InputRange) or not input_range.scale > 0
    ]
    if odd:
        raise SettingError(f"ranges: {first_few(odd, ', ')}: no InputRange with a scale above 0")
    copied = without_input_ranges(model)
    modules = dict(copied.named_modules())
    missing = [repr(name) for name in ranges if name not in modules]
    if missing:
        raise SettingError(f"ranges: {type(model).__name__} has no {first_few(missing, ', ')}")
    for name, input_range in ranges.items():
        quantizer = quantize_input(modules[name], input_range.bits)
        quantizer.scale.fill_(input_range.scale)
        quantizer.zero_point.fill_(input_range.zero_point)
    return copied


def without_input_ranges(model: nn.Module) -> nn.Module:
    """Make a copy of the model that quantizes no input, for a backend that finds ranges of its own.

    Args:
        model: The model; it is not changed.

    Returns:
        The copy.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = mpq.with_input_ranges(torch.nn.Sequential(torch.nn.Linear(8, 8)), {"0": mpq.InputRange(8, 0.5, 128)})
        >>> mpq.input_ranges(mpq.without_input_ranges(net))
        {}
    """
    copied = duplicate(model)
    for name in _quantizers(copied):
        layer = copied.get_submodule(name)
        delattr(layer, NAME)
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is _quantize:
                del layer._forward_pre_hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)
    return copied


def refuse_input_ranges(model: nn.Module) -> None:
    """Raise SettingError for a model that quantizes inputs, where that would be dropped, or done twice, in silence."""
    quantized = [repr(name) for name in _quantizers(model)]
    if quantized:
        raise SettingError(
            f"{type(model).__name__}: quantizes the inputs of {first_few(quantized, ', ')} in ranges of its own, which "
            "would be lost or come twice here: give mpq_plugins.without_input_ranges(model)"
        )


def is_input_quantizer(hook: object) -> bool:
    """Whether a forward pre-hook is the one that quantizes a layer's input in the range it carries."""
    return hook is _quantize


def _quantizers(model: nn.Module) -> dict[str, InputQuantizer]:
    attributes = {name: getattr(module, NAME, None) for name, module in model.named_modules()}
    return {name: held for name, held in attributes.items() if isinstance(held, InputQuantizer)}


def _quantize(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    quantizer = getattr(layer, NAME)
    if not bool(quantizer.scale != 0):
        return None
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    name, value = next(iter(kwargs.items()))
    return args, {**kwargs, name: quantizer(value)}
