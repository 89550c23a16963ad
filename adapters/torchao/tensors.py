"""A plan in torchao: its own quantized tensors, built from the plan's integers."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.models.tracing import Traced
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.integers import IntegerWeight, integer_weight
from mpq_plugins.simulation.model import float_copy

from ..shared.folded import planned_layers
from ..shared.input_ranges import taken_ranges
from .checks import check_traced

DYNAMIC = "int8_asym_per_token"


@IntxUnpackedToInt8Tensor.implements(torch.ops.aten.conv1d.default)  # type: ignore[untyped-decorator]
@IntxUnpackedToInt8Tensor.implements_torch_function(F.conv1d)  # type: ignore[untyped-decorator]
def _conv1d(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    inputs, weight, *rest = args
    convolved: Tensor = F.conv1d(inputs, weight.dequantize(), *rest, **(kwargs or {}))
    return convolved


def apply(model: nn.Module, plan: Plan, batches: Iterable[Any] = ()) -> nn.Module:
    """Make a copy of the model whose planned weights are torchao tensors of the plan's integers.

    Inputs of 8 bits are quantized per token as they come, asymmetric, in linear layers; torchao has such a kernel for
    those alone. Tied weights stay tied.

    Args:
        model: The float model; it is not changed.
        plan: The plan.
        batches: Nothing is calibrated, which needs none.

    Returns:
        The copy.

    Raises:
        MismatchError: The plan is another model's, or a layer's weight is used where torchao's tensors fail. The
            message names layers and the remedy.
        SettingError: torchao cannot run the plan.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import torchao
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(net))
        >>> torch.equal(torchao.apply(net, plan)[0].weight.dequantize(), mpq.apply(net, plan)[0].weight)
        True
    """
    model, _ = taken_ranges(plan, model)  # which are as the plan says: of each token, as it comes
    traced = Traced(model)
    check_traced(plan, traced)
    quantized = float_copy(traced, plan)
    weights = quantizable_weights(quantized)
    for layer in planned_layers(plan):
        parameter = nn.Parameter(_tensor(weights[layer.name], layer), requires_grad=False)
        for name in layer.names:
            quantized.get_submodule(name).weight = parameter
    return quantized


def dynamic_name(layer: LayerChoice) -> str | None:
    """How a layer quantizes its input as it comes, in torchao's words; None where it does not."""
    return None if layer.activations is None else DYNAMIC


def _tensor(weight: Tensor, layer: LayerChoice) -> IntxUnpackedToInt8Tensor:
    integers = integer_weight(weight, layer)
    blocks = (layer.channels, integers.scale.shape[1], *(1 for _ in layer.shape[2:]))
    device, activation = weight.device, dynamic_name(layer)
    return IntxUnpackedToInt8Tensor(
        integers.codes.to(device), integers.scale.reshape(blocks).to(device),
        integers.zero_point.to(torch.int8).reshape(blocks).to(device), dtype_of(layer), block_size(integers),
        weight.dtype, activation_type(activation),
    )  # fmt: skip


def activation_type(name: str | None) -> Any:
    """torchao's own value for it."""
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8TensorActivationQuantization,
    )

    return None if name is None else IntxUnpackedToInt8TensorActivationQuantization(name)


def dtype_of(layer: LayerChoice) -> torch.dtype:
    """torchao's name for the widest part; its int1 has no +1, so binary codes are int2."""
    dtype: torch.dtype = getattr(torch, f"int{max(2, *(part.bits for part in layer.all_parts))}")
    return dtype


def block_size(integers: IntegerWeight) -> tuple[int, ...]:
    """Of the weights that share a scale: one output channel, a group of its inputs, the whole kernel."""
    _, inputs, *kernel = integers.codes.shape
    return (1, inputs // integers.scale.shape[1], *kernel)
