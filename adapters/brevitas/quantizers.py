"""The weight quantizers that Brevitas is given: its own parts on the plan's grid, channel widths included.

A layer of one width from 2 to 8 bits, or of channels of several, is an IntQuant whose scale is a parameter that
starts at the plan's; a layer of 1 bit is a BinaryQuant, and one of 2 symmetric bits a TernaryQuant where asked for.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from brevitas import config
from brevitas.core.function_wrapper import Identity, RoundSte, TensorClamp
from brevitas.core.quant import BinaryQuant, IntQuant, RescalingIntQuant, TernaryQuant
from brevitas.core.scaling import ParameterScaling
from brevitas.core.utils import SingleArgStatelessBuffer
from brevitas.function.ops_ste import binary_sign_ste
from brevitas.inject.enum import FloatToIntImplType, QuantType, RestrictValueType, ScalingPerOutputType
from brevitas.proxy import WeightQuantProxyFromInjector
from brevitas.proxy.groupwise_int_parameter_quant import GroupwiseWeightQuantProxyFromInjector
from brevitas.quant.solver import WeightQuantSolver
from torch import Tensor, nn

from mpq_plugins.errors import MismatchError
from mpq_plugins.plans.entropy_coded import EntropyCoded
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.simulation.integers import IntegerWeight, integer_weight

TERNARY_THRESHOLD = 0.5  # of the scale: where rounding to nearest turns


class _PlanBuffers(nn.Module):
    """Buffers that a checkpoint of float weights need not have, while Brevitas loads one."""

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *rest)
        if config.IGNORE_MISSING_KEYS:
            missing_keys[:] = [key for key in missing_keys if key.removeprefix(prefix) not in self._buffers]


class PlanBitWidth(_PlanBuffers):
    """A layer's bits, one number or one for each output channel, and the choice they come from.

    Both lie in the state dict, which in Brevitas holds no widths: a checkpoint of another plan is refused.
    """

    bits: Tensor
    choice: Tensor

    def __init__(self, plan_bits: Tensor, plan_choice: LayerChoice, device: torch.device | None = None) -> None:
        super().__init__()
        self.layer = plan_choice.name
        self.register_buffer("bits", plan_bits.to(device, copy=True))
        stored = list(plan_choice.model_dump_json().encode())
        self.register_buffer("choice", torch.tensor(stored, dtype=torch.uint8, device=device))

    def forward(self) -> Tensor:
        """The widths, broadcastable to the weight."""
        return self.bits

    def check(self, state: Mapping[str, Any], prefix: str) -> None:
        """Raise MismatchError where `state` holds this layer under another choice."""
        stored = state.get(f"{prefix}choice")
        if isinstance(stored, Tensor) and not torch.equal(stored.cpu(), self.choice.cpu()):
            raise MismatchError(
                f"layer {self.layer!r}: the checkpoint holds it as {_described(stored)}, this model as "
                f"{_described(self.choice)}. Load it with brevitas.load, or convert with the plan it was made by."
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.check(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class PlanZeroPoint(_PlanBuffers):
    """The plan's zero points, fixed."""

    value: Tensor

    def __init__(self, plan_zero_point: Tensor, device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("value", plan_zero_point.to(device, copy=True))

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        """Zero points, broadcastable to the weight; a copy, for exporters would make one name of equal buffers."""
        return self.value.clone()


class PlanIntQuant(_PlanBuffers, IntQuant):  # type: ignore[misc]
    """Brevitas's IntQuant that rounds before it adds the zero point, and takes the sign of channels of 1 bit.

    binary_gain: 1, or 0 for channels of 1 bit whose weights are all 0; broadcastable to the weight. plan_offset: what
    an entropy-coded plan adds to magnitudes before it truncates them; None rounds to nearest. A learned rounding takes
    the place of either.
    """

    binary_gain: Tensor
    input_view_impl: nn.Module
    float_to_int_impl: nn.Module
    tensor_clamp_impl: nn.Module

    def __init__(  # noqa: PLR0913  # Brevitas gives each by its name
        self, narrow_range: bool, signed: bool, input_view_impl: nn.Module, float_to_int_impl: nn.Module,
        tensor_clamp_impl: nn.Module, binary_gain: Tensor, plan_offset: float | None = None,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        super().__init__(narrow_range, signed, input_view_impl, float_to_int_impl, tensor_clamp_impl)
        self.plan_offset = plan_offset
        self.register_buffer("binary_gain", binary_gain.to(device, copy=True))

    def to_int(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """Integer codes as floats, in the quantizer's view."""
        x = self.input_view_impl(x)
        codes = self._rounded(x / scale) + zero_point
        limits = cast(Any, self)
        codes = self.tensor_clamp_impl(codes, min_val=limits.min_int(bit_width), max_val=limits.max_int(bit_width))
        binary = binary_sign_ste(x) * self.binary_gain + zero_point
        return torch.where(bit_width == 1, binary, codes)

    def _rounded(self, position: Tensor) -> Tensor:
        if self.plan_offset is None or not isinstance(self.float_to_int_impl, RoundSte):
            return cast(Tensor, self.float_to_int_impl(position))
        return truncated(position, self.plan_offset)


def truncated(position: Tensor, offset: float) -> Tensor:
    """sign(x) floor(|x| + offset), whose gradient is 1."""
    whole = torch.floor(position.detach().abs() + offset)
    codes = torch.where(position.detach() < 0, -whole, whole)
    # The difference is exact: it is the whole position, or two numbers that lie within a factor of 2 of each other.
    return position + (codes - position.detach())


class PlanQuant(RescalingIntQuant):  # type: ignore[misc]
    """Brevitas's RescalingIntQuant that reports the widest channel's bits, for a QuantTensor holds one number."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Dequantized weight, scale, zero point, bits."""
        value, scale, zero_point, bit_width = super().forward(x)
        return value, scale, zero_point, bit_width.max()


class PlanBinaryQuant(BinaryQuant):  # type: ignore[misc]
    """Brevitas's BinaryQuant whose width lies in the state dict."""

    def __init__(self, scaling_impl: nn.Module, bit_width_impl: nn.Module) -> None:
        super().__init__(scaling_impl)
        self.bit_width = bit_width_impl


class PlanTernaryQuant(TernaryQuant):  # type: ignore[misc]
    """Brevitas's TernaryQuant whose width lies in the state dict."""

    def __init__(self, scaling_impl: nn.Module, threshold: float, bit_width_impl: nn.Module) -> None:
        super().__init__(scaling_impl, threshold)
        self.bit_width = bit_width_impl


def weight_quantizer(weight: Tensor, layer: LayerChoice, ternary: bool = False) -> type:
    """The injector for one layer, to be given as `weight_quant`. Raises as integer_weight."""
    scheme = layer.scheme.as_affine
    assert scheme is not None
    integers = integer_weight(weight, layer)
    grouped = scheme.granularity == "per_group"
    signed = layer.bits == 1 or scheme.symmetric
    settings: dict[str, Any] = {
        "proxy_class": GroupwiseWeightQuantProxyFromInjector if grouped else WeightQuantProxyFromInjector,
        "quant_type": QuantType.INT,
        "tensor_quant": PlanQuant,
        "int_quant": PlanIntQuant,
        "signed": signed,
        "narrow_range": signed and layer.bits != 1,
        "float_to_int_impl_type": FloatToIntImplType.ROUND,
        "tensor_clamp_impl": TensorClamp,
        "restrict_scaling_type": RestrictValueType.FP,
        "scaling_impl": ParameterScaling,
        "scaling_per_output": _granularity(integers, grouped),
        "int_scaling_impl": SingleArgStatelessBuffer(1.0),
        "zero_point_impl": PlanZeroPoint,
        "bit_width_impl": PlanBitWidth,
        "plan_choice": layer,
    }
    if isinstance(layer.scheme, EntropyCoded):
        settings |= {"plan_offset": layer.scheme.offset}
    settings |= _grid(integers, layer, grouped)
    settings |= {"group_size": layer.scheme.group_size} if grouped else {"input_view_impl": Identity}
    if layer.bits == 1 and not grouped:  # Brevitas's own knows no groups
        settings |= {"quant_type": QuantType.BINARY, "tensor_quant": PlanBinaryQuant}
    elif ternary:
        settings |= {
            "quant_type": QuantType.TERNARY, "tensor_quant": PlanTernaryQuant, "threshold": TERNARY_THRESHOLD,
        }  # fmt: skip
    return type("PlanWeightQuant", (WeightQuantSolver,), settings)


def _grid(integers: IntegerWeight, layer: LayerChoice, grouped: bool) -> dict[str, Any]:
    """Scales, zero points and widths in the shapes that Brevitas's parts broadcast over the weight."""
    view = _view(integers, len(layer.shape), grouped)
    row_bits = channel_bits(layer)
    # Channels of 1 bit that are all 0 have code 0, all others +-1.
    empty = (integers.group_rows(integers.codes) == 0).all(1).reshape(integers.scale.shape) & (row_bits == 1)[:, None]
    # BinaryQuant knows +-scale alone, and so says 0 by the scale.
    scale = view(integers.scale.masked_fill(empty, 0) if layer.bits == 1 and not grouped else integers.scale)
    rows = row_bits[:, None].expand(integers.scale.shape)
    return {
        "scaling_init": scale,
        "scaling_shape": tuple(scale.shape) or None,
        "binary_gain": view((~empty).float()),
        "plan_zero_point": view(_zero_point(integers, layer, row_bits)),
        "plan_bits": view(rows) if layer.bits is None else torch.tensor(float(layer.bits)),
    }


def channel_bits(layer: LayerChoice) -> Tensor:
    """The bits of each output channel, float (channels,)."""
    bits = torch.zeros(layer.channels)
    for part in layer.all_parts:
        bits[part.runs.array()] = part.bits
    return bits


def bit_widths(module: nn.Module) -> PlanBitWidth | None:
    """Where a Brevitas layer keeps its plan's bits; None for one that was not made from a plan."""
    return next((child for child in module.modules() if isinstance(child, PlanBitWidth)), None)


def _zero_point(integers: IntegerWeight, layer: LayerChoice, row_bits: Tensor) -> Tensor:
    """Asymmetric codes start at 0 in Brevitas, and at -2^(b-1) in ours; channels of 1 bit are -1, 0, 1 beside them."""
    scheme = layer.scheme.as_affine
    assert scheme is not None
    if scheme.symmetric or layer.bits == 1:
        return integers.zero_point.float()
    shift = torch.where(row_bits == 1, torch.tensor(1.0), 2 ** (row_bits - 1))
    return integers.zero_point.float() + shift[:, None]


def _granularity(integers: IntegerWeight, grouped: bool) -> Any:
    if grouped:
        return ScalingPerOutputType.GROUP
    return ScalingPerOutputType.TENSOR if integers.one_scale else ScalingPerOutputType.CHANNEL


def _view(integers: IntegerWeight, ndim: int, grouped: bool) -> Any:
    """From (channels, groups) to what broadcasts over the weight as Brevitas sees it: groups split off, if any."""
    if integers.one_scale and not grouped:
        return lambda values: values[0, 0].clone()
    shape = [1] * (ndim + grouped)
    if not grouped:
        shape[integers.channel_axis] = -1
        return lambda values: values[:, 0].reshape(shape)
    channels, groups = integers.scale.shape
    if integers.channel_axis == 0:
        shape[0], shape[1] = channels, groups
        return lambda values: values.reshape(shape)
    shape[0], shape[2] = groups, channels
    return lambda values: values.t().reshape(shape)


def _described(choice: Tensor) -> str:
    layer = LayerChoice.model_validate_json(bytes(choice.tolist()))
    return f"{layer.bits_text} bits, {layer.scheme}"
