"""A plan in torchao: its own quantized tensors, built from the plan's integers.

    quantized = torchao.apply(model, plan)        # a copy; exact, channel parts included
    torchao.verify(quantized, plan, model)        # integer codes against the plan's
    quantize_(model, torchao.to_config(plan))     # stock torchao: the plan's widths, torchao's own scales

Importing this module teaches torchao's IntxUnpackedToInt8Tensor the one-dimensional convolution, so import it
before loading a model that has one. Nothing is packed: a weight of any width takes a byte.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig, PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import MismatchError, SettingError, VerifyError
from mpq_plugins.models.borrowed import borrowed_uses
from mpq_plugins.models.folding import folded_copy
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.models.plain import why_not_plain
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.legalise import Capabilities, require_legal
from mpq_plugins.plans.names import weight_name
from mpq_plugins.plans.plan import Plan
from mpq_plugins.plans.scheme import Affine
from mpq_plugins.simulation.integers import IntegerWeight, integer_weight

from .folded import (
    as_measured,
    changed_state,
    check_max_norm,
    check_model,
    check_plan,
    check_sizes,
    lent_weights,
    planned_by_name,
    planned_layers,
)
from .outputs import output_problems

CAPABILITIES = Capabilities(
    backend="torchao",
    bits=tuple(range(1, 9)),
    kinds=("linear", "conv1d", "conv2d", "embedding"),
    granularities=("per_tensor", "per_channel", "per_group"),
    parts=True,
    activation_bits=(None, 8),
    activation_kinds=("linear", "embedding"),  # an embedding takes indices; convolutions have no such kernel
)
CONFIG_CAPABILITIES = Capabilities(
    backend="torchao's IntxWeightOnlyConfig",
    bits=tuple(range(2, 9)),
    kinds=("linear", "embedding"),
    granularities=("per_channel", "per_group"),
)
DYNAMIC = "int8_asym_per_token"
FUNCTIONS = {F.linear, F.embedding, F.conv1d, F.conv2d}
"""What of torch's functions takes such a tensor for its weight; of arguments by name, torchao's lose some."""


@IntxUnpackedToInt8Tensor.implements(torch.ops.aten.conv1d.default)  # type: ignore[untyped-decorator]
@IntxUnpackedToInt8Tensor.implements_torch_function(F.conv1d)  # type: ignore[untyped-decorator]
def _conv1d(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    inputs, weight, *rest = args
    convolved: Tensor = F.conv1d(inputs, weight.dequantize(), *rest, **(kwargs or {}))
    return convolved


@dataclass(frozen=True)
class LayerCheck:
    """One layer as it lies in the quantized model: its bits by channel count, and torchao's name for its codes."""

    layer: str
    bits: tuple[tuple[int, int], ...]
    dtype: str


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model whose planned weights are torchao tensors of the plan's integers.

    A plan with 8-bit activations quantizes the inputs of linear layers per token as they come; torchao has such a
    kernel for those alone. Tied weights stay tied. Raises MismatchError (another model, or a layer whose weight is
    used where torchao's tensors fail) and SettingError (a plan that torchao cannot run), naming layers and remedy.
    """
    _check(plan, model)
    quantized = folded_copy(model, plan)
    weights = quantizable_weights(quantized)
    for layer in planned_layers(plan):
        parameter = nn.Parameter(_tensor(weights[layer.name], layer, plan.activation_bits), requires_grad=False)
        for name in layer.names:
            quantized.get_submodule(name).weight = parameter
    return quantized


def to_config(plan: Plan, model: nn.Module | None = None) -> FqnToConfig:
    """The plan's widths, granularity and symmetry as stock torchao's config, for `quantize_` and TorchAoConfig.

    torchao chooses scales its own way (symmetric 4 bits: max|w| / 7.5), so weights come close to the plan's and are
    not equal; `apply` is exact. Linear and embedding layers, 2 to 8 bits, per channel or per group. torchao ignores
    names it does not find: give `model` to have them checked. Raises SettingError for anything else, and for tied
    weights, which quantize_ would untie; MismatchError for another model.
    """
    check_plan(plan)
    if model is not None:
        check_model(plan, model)
    require_legal(plan, CONFIG_CAPABILITIES)
    configs: OrderedDict[str, IntxWeightOnlyConfig | None] = OrderedDict()
    for layer in planned_layers(plan):
        if layer.tied:
            raise SettingError(
                f"layer {layer.name!r}: shares its weight with {layer.tied[0]!r}, which quantize_ would untie. Use "
                "apply(), or skip it"
            )
        # The parameter's name and not the module's, which transformers would apply to the bias too.
        configs[weight_name(layer.name)] = _config(layer)
    return FqnToConfig(fqn_to_config=configs)


def verify(quantized: nn.Module, plan: Plan, model: nn.Module, *, batch: Any = None) -> tuple[LayerCheck, ...]:
    """Read the integer codes back and compare them, their scales and zero points with the plan's of the float `model`.

    Layers that the plan leaves in float must be the model's own, and activations quantized where the plan says so.
    batch: inputs on which the outputs must be those of `mpq_plugins.apply`, within float rounding (1e-4 of their norm;
    half precision 1e-2), or with 8-bit activations within 5 %. Raises VerifyError listing what is wrong, MismatchError
    for another model, SettingError where the float model does not run on the batch.
    """
    check_model(plan, model)
    original_model = as_measured(model, plan)
    original = quantizable_weights(original_model)
    stored = quantizable_weights(quantized)
    planned = {layer.name: layer for layer in planned_layers(plan)}
    problems: list[str] = [f"{name!r} is missing" for name in original if name not in stored]
    checks: list[LayerCheck] = []
    for name, weight in stored.items():
        if name not in planned:
            if not (name in original and weight.shape == original[name].shape and original[name].equal(_plain(weight))):
                problems.append(f"{name!r} is not the model's own, and the plan leaves it in float")
            continue
        layer = planned[name]
        dynamic = _dynamic(layer, plan.activation_bits)
        problem = _problem(weight, integer_weight(original[name], layer), dynamic, original[name].dtype)
        if problem:
            problems.append(f"{name!r} {problem}")
        else:
            checks.append(LayerCheck(name, layer.widths, str(cast(Any, weight).target_dtype)))
    weights = {weight_name(name) for layer in plan.layers for name in layer.names}
    problems += changed_state(quantized, original_model, weights)
    for layer in planned.values():
        kept = [name for name in layer.names if _module_weight(quantized, name) is stored.get(layer.name)]
        problems += [f"{name!r} is no longer tied to {layer.name!r}" for name in layer.tied if name not in kept]
    problems = problems or output_problems(quantized, plan, model, batch)
    if problems:
        raise VerifyError(f"{type(quantized).__name__} does not hold the plan: {first_few(problems)}")
    return tuple(checks)


def _check(plan: Plan, model: nn.Module) -> None:
    check_model(plan, model)
    require_legal(plan, CAPABILITIES)
    check_max_norm(plan, model)
    check_sizes(plan, "torchao")
    uses = borrowed_uses(model)
    borrowed = {name for name in lent_weights(model) if not uses.get(name, {None}) <= FUNCTIONS}
    problems = [problem for name in planned_by_name(plan) for problem in _troubles(name, model, borrowed)]
    if problems:
        raise MismatchError(f"torchao cannot run this plan on {type(model).__name__}: {first_few(problems)}")


def _troubles(name: str, model: nn.Module, borrowed: set[str]) -> Iterator[str]:
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    reason = why_not_plain(module, hooks=False)
    if isinstance(parent, nn.MultiheadAttention):
        yield f"{name!r} is MultiheadAttention's own, whose kernels fail on torchao's tensors: skip it"
    elif reason:
        yield f"{name!r} {reason}, and may fail on torchao's tensors: skip it"
    elif weight_name(name) in borrowed:
        yield f"{name!r} lends its weight to a functional call, which may fail on torchao's tensors: skip it"


def _dynamic(layer: LayerChoice, activation_bits: int | None) -> str | None:
    return DYNAMIC if activation_bits is not None and layer.kind == "linear" else None


def _tensor(weight: Tensor, layer: LayerChoice, activation_bits: int | None) -> IntxUnpackedToInt8Tensor:
    integers = integer_weight(weight, layer)
    blocks = (layer.channels, integers.scale.shape[1], *(1 for _ in layer.shape[2:]))
    device, activation = weight.device, _dynamic(layer, activation_bits)
    return IntxUnpackedToInt8Tensor(
        integers.codes.to(device), integers.scale.reshape(blocks).to(device),
        integers.zero_point.to(torch.int8).reshape(blocks).to(device), _dtype(layer), _block_size(integers),
        weight.dtype, _activation(activation),
    )  # fmt: skip


def _activation(name: str | None) -> Any:
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8TensorActivationQuantization,
    )

    return None if name is None else IntxUnpackedToInt8TensorActivationQuantization(name)


def _dtype(layer: LayerChoice) -> torch.dtype:
    """torchao's name for the widest part; its int1 has no +1, so binary codes are int2."""
    dtype: torch.dtype = getattr(torch, f"int{max(2, *(part.bits for part in layer.groups))}")
    return dtype


def _config(layer: LayerChoice) -> IntxWeightOnlyConfig:
    scheme = layer.scheme
    assert isinstance(scheme, Affine)
    assert layer.bits is not None
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{layer.bits}"),
        granularity=PerAxis(0) if scheme.group_size is None else PerGroup(scheme.group_size),
        mapping_type=MappingType.SYMMETRIC if scheme.symmetric else MappingType.ASYMMETRIC,
    )


def _problem(weight: Tensor, expected: IntegerWeight, dynamic: str | None, dtype: torch.dtype) -> str | None:
    if not isinstance(weight, IntxUnpackedToInt8Tensor):
        return f"was left in float ({type(weight).__name__})"
    codes, scale = cast(Tensor, weight.qdata).cpu(), cast(Tensor, weight.scale).cpu()
    problem = expected.code_problem(codes)
    if problem is not None:
        return problem
    zero_point = cast(Tensor, weight.zero_point).cpu().long()
    if not (_same(scale, expected.scale) and _same(zero_point, expected.zero_point)):
        return "has other scales or zero points than the plan's"
    if tuple(weight.block_size) != _block_size(expected) or weight.dtype != dtype:
        return (
            f"has blocks of {tuple(weight.block_size)} in {weight.dtype}, the plan {_block_size(expected)} in {dtype}"
        )
    if weight.activation_quantization != _activation(dynamic):
        return f"quantizes its input as {weight.activation_quantization}, the plan as {dynamic}"
    return None


def _block_size(integers: IntegerWeight) -> tuple[int, ...]:
    """Of the weights that share a scale: one output channel, a group of its inputs, the whole kernel."""
    _, inputs, *kernel = integers.codes.shape
    return (1, inputs // integers.scale.shape[1], *kernel)


def _same(stored: Tensor, expected: Tensor) -> bool:
    return stored.numel() == expected.numel() and stored.reshape(expected.shape).equal(expected)


def _plain(weight: Tensor) -> Tensor:
    return weight.dequantize() if isinstance(weight, IntxUnpackedToInt8Tensor) else weight


def _module_weight(model: nn.Module, name: str) -> Tensor:
    return cast(Tensor, model.get_submodule(name).weight)
