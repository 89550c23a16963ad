"""Quantized inputs of layers, in ranges that a model carries along with its weights, or that each input has itself.

x' = (clamp(round(x / scale) + zero_point, 0, 2^b - 1) - zero_point) scale: one scale and zero point a layer where the
range is static, and one of each input, or of each of its tokens, where it is dynamic.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.public import public
from ..common.text import first_few
from ..errors import SettingError
from ..plans.activations import DYNAMICS, Activations, Dynamic
from .arguments import check_module
from .copying import duplicate
from .running import first_input, with_first_input

NAME = "input_quantizer"


@public
@dataclass(frozen=True)
class InputRange:
    """One layer's: its input at b bits has the levels (code - zero_point) scale, code in 0 .. 2^b - 1.

    Attributes:
        bits: b.
        scale: The step between two levels, in the input's units; 0 for a dynamic range.
        zero_point: The code of 0; 0 for a dynamic range.
        dynamic: None for a static range; `per_tensor` or `per_token` where each input, or each of its tokens, has the
            range of its own extremes.
        symmetric: Whether a dynamic range has its zero point in the middle.
    """

    bits: int
    scale: float = 0.0
    zero_point: int = 0
    dynamic: Dynamic | None = None
    symmetric: bool = False


class InputQuantizer(nn.Module):
    """Quantizes and dequantizes a layer's input; a static range with a scale of 0 lets it pass."""

    scale: Tensor
    zero_point: Tensor
    levels: Tensor

    def __init__(self, bits: int, dynamic: Dynamic | None = None, *, symmetric: bool = False) -> None:
        super().__init__()
        self.bits, self.dynamic, self.symmetric = bits, dynamic, symmetric
        self.register_buffer("scale", torch.zeros((), dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.float32))
        self.register_buffer("levels", torch.tensor(2**bits))  # so that a state dict says it
        if dynamic is not None:
            self.register_buffer("dynamic_kind", torch.tensor([DYNAMICS.index(dynamic), int(symmetric)]))

    @property
    def passes(self) -> bool:
        """Whether it lets every input pass as it is."""
        return self.dynamic is None and not bool(self.scale != 0)

    def forward(self, x: Tensor) -> Tensor:
        """x, of any shape, at the levels of its range, in its own type."""
        return at_levels(x, self.bits, (self.scale, self.zero_point), self.dynamic, symmetric=self.symmetric)

    def _apply(self, fn: Any, recurse: bool = True) -> "InputQuantizer":
        """Move it as modules are moved, its range in float32: half precision would make another range of it."""
        kept = {name: self._buffers[name] for name in ("scale", "zero_point")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            moved = self._buffers[name]
            if before is not None and moved is not None and moved.dtype != before.dtype:
                self._buffers[name] = before.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """For print(model)."""
        grid = ", symmetric" if self.symmetric else ""
        return f"bits={self.bits}" if self.dynamic is None else f"bits={self.bits}, dynamic={self.dynamic}{grid}"


def quantized_input(x: Tensor, input_range: InputRange) -> Tensor:
    """x at the levels of a range, in its own type."""
    scale, zero_point = torch.tensor((input_range.scale, input_range.zero_point), dtype=torch.float32)
    return at_levels(x, input_range.bits, (scale, zero_point), input_range.dynamic, symmetric=input_range.symmetric)


def at_levels(
    x: Tensor, bits: int, static: tuple[Tensor, Tensor], dynamic: Dynamic | None, *, symmetric: bool
) -> Tensor:
    """x at the levels of a range, in its own type; worked out in float32 at least, for 65,535 levels.

    static: scale and zero point, where the range is not dynamic. An empty x stays as it is.
    """
    if not x.numel():
        return x
    exact = x if x.dtype == torch.float64 else x.float()
    grid = static if dynamic is None else dynamic_range(exact.detach(), bits, dynamic, symmetric=symmetric)
    return fake_quantize_input(exact, *grid, bits).to(x.dtype)


def dynamic_range(x: Tensor, bits: int, dynamic: Dynamic, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an input's own extremes and 0: of all of it, or of each token, which is the last axis.

    An input, or a token, that is all zero keeps its values.
    """
    if dynamic == "per_tensor":
        return range_grid(x.amin(), x.amax(), bits, symmetric=symmetric)
    return range_grid(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), bits, symmetric=symmetric)


def range_grid(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the b-bit codes that reach from low, or from 0, to high, or to 0.

    Symmetric codes have their zero point in the middle, at 2^(b-1), and one level more below it than above. Where both
    ends are 0 the scale is 1.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    top = 2**bits - 1
    if symmetric:
        scale = torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
        return _above_0(scale), torch.full_like(scale, 2 ** (bits - 1))
    scale = _above_0((high - low) / top)
    return scale, torch.round(-low / scale).clamp(0, top)


def _above_0(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def fake_quantize_input(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Levels of x. Gradients pass through the rounding (LSQ, Esser et al. 2020, arXiv 1902.08153, eq. 1 to 3)."""
    position = x / scale
    codes = position + (position.round() - position).detach() + zero_point
    return (codes.clamp(0, 2**bits - 1) - zero_point) * scale


def quantize_input(
    layer: nn.Module, bits: int, dynamic: Dynamic | None = None, *, symmetric: bool = False
) -> InputQuantizer:
    """Give a layer an InputQuantizer; the layer's own, if it has such a one. A static one lets everything pass.

    Raises SettingError where something else has its name, or it quantizes otherwise.
    """
    known = getattr(layer, NAME, None)
    if (
        isinstance(known, InputQuantizer)
        and (known.bits, known.dynamic) == (bits, dynamic)
        and (dynamic is None or known.symmetric == symmetric)
    ):
        return known
    if known is not None:
        raise SettingError(f"{type(layer).__name__}: has another {NAME}, {known}; take it away first")
    quantizer = InputQuantizer(bits, dynamic, symmetric=symmetric).to(next(layer.parameters()).device)
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
        {'0': InputRange(bits=8, scale=0.5, zero_point=128, dynamic=None, symmetric=False)}
    """
    if not isinstance(source, Mapping):
        check_module(source, "source")
    state = source.state_dict() if isinstance(source, nn.Module) else source
    tail = f"{NAME}.levels"
    ranges = {}
    for key in (key for key in map(str, state) if key == tail or key.endswith(f".{tail}")):
        prefix = key.removesuffix("levels")
        layer = prefix.removesuffix(f"{NAME}.").removesuffix(".")
        bits = int(state[key]).bit_length() - 1
        kind = state.get(f"{prefix}dynamic_kind")
        if kind is not None:
            ranges[layer] = InputRange(bits, dynamic=DYNAMICS[int(kind[0])], symmetric=bool(kind[1]))
        else:
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
    check_module(model)
    if not isinstance(ranges, Mapping):
        raise SettingError(f"ranges: is a {type(ranges).__name__}; give a mapping of layers' names to their InputRange")
    odd = [
        repr(name)
        for name, input_range in ranges.items()
        if not isinstance(input_range, InputRange) or not (input_range.dynamic or input_range.scale > 0)
    ]
    if odd:
        raise SettingError(f"ranges: {first_few(odd, ', ')}: no InputRange with a scale above 0, or a dynamic one")
    copied = without_input_ranges(model)
    modules = dict(copied.named_modules(remove_duplicate=False))
    missing = [repr(name) for name in ranges if name not in modules]
    if missing:
        raise SettingError(f"ranges: {type(model).__name__} has no {first_few(missing, ', ')}")
    put_input_ranges(copied, ranges)
    return copied


def put_input_ranges(model: nn.Module, ranges: Mapping[str, InputRange]) -> None:
    """Let the model's own layers quantize their inputs in these ranges; it has such layers, and no ranges yet."""
    for name, found in ranges.items():
        quantizer = quantize_input(model.get_submodule(name), found.bits, found.dynamic, symmetric=found.symmetric)
        quantizer.scale.fill_(found.scale)
        quantizer.zero_point.fill_(found.zero_point)


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
    check_module(model)
    copied = duplicate(model)
    take_input_ranges(copied)
    return copied


def take_input_ranges(model: nn.Module) -> None:
    """Take them from the model's own layers."""
    for name in _quantizers(model):
        layer = model.get_submodule(name)
        delattr(layer, NAME)
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is _quantize:
                del layer._forward_pre_hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)


def refuse_input_ranges(model: nn.Module) -> None:
    """Raise SettingError for a model that quantizes inputs, where that would be dropped, or done twice, in silence."""
    quantized = [repr(name) for name in _quantizers(model)]
    if quantized:
        raise SettingError(
            f"{type(model).__name__}: quantizes the inputs of {first_few(quantized, ', ')} in ranges of its own, which "
            "would be lost or come twice here: give mpq_plugins.without_input_ranges(model)"
        )


def holds(found: InputRange, planned: Activations | None) -> bool:
    """Whether a range is one of those that a plan's activations may have."""
    if planned is None or (found.bits, found.dynamic) != (planned.bits, planned.dynamic):
        return False
    if found.dynamic is not None:
        return found.symmetric == planned.symmetric
    return not planned.symmetric or found.zero_point == 2 ** (found.bits - 1)


def idle_quantizers(model: nn.Module) -> list[str]:
    """Layers that carry a quantizer of their input, and compute with the input as it is."""
    return [
        name
        for name, quantizer in _quantizers(model).items()
        if quantizer.passes or not any(map(is_input_quantizer, model.get_submodule(name)._forward_pre_hooks.values()))
    ]


def is_input_quantizer(hook: object) -> bool:
    """Whether a forward pre-hook is the one that quantizes a layer's input in the range it carries."""
    return hook is _quantize


def _quantizers(model: nn.Module) -> dict[str, InputQuantizer]:
    attributes = {name: getattr(module, NAME, None) for name, module in model.named_modules()}
    return {name: held for name, held in attributes.items() if isinstance(held, InputQuantizer)}


def _quantize(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    quantizer = getattr(layer, NAME)
    if quantizer.passes:
        return None
    return with_first_input(args, kwargs, quantizer(first_input(args, kwargs)))
