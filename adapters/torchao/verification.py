"""Proof that a model holds the plan in torchao's tensors: codes and scales, read back and compared."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import VerifyError
from mpq_plugins.models.arguments import check_module
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.models.tracing import Traced
from mpq_plugins.plans.names import weight_name
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.integers import IntegerWeight, integer_weight

from ..contract import LayerCheck
from ..shared.folded import as_planned, changed_state, check_model, planned_layers
from ..shared.input_ranges import taken_ranges
from ..shared.outputs import output_problems
from .tensors import activation_type, block_size, dynamic_name


def verify(quantized: nn.Module, plan: Plan, model: nn.Module, *, batch: Any = None) -> tuple[LayerCheck, ...]:
    """Read the integer codes back and compare them, their scales and zero points with the plan's of the float model.

    Layers that the plan leaves in float must be the model's own, and activations quantized where the plan says so.

    Args:
        quantized: The quantized model.
        plan: The plan.
        model: The float model.
        batch: Inputs on which the outputs must be those of `mpq_plugins.apply`, within float rounding (1e-4 of their
            norm; half precision 1e-2), or with 8-bit activations within 5 %.

    Returns:
        A check for each planned layer.

    Raises:
        VerifyError: The model does not hold the plan. The message lists what is wrong.
        MismatchError: The plan is another model's.
        SettingError: The float model does not run on the batch.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import torchao
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(net))
        >>> torchao.verify(torchao.apply(net, plan), plan, net, batch=torch.ones(2, 8))[0].bits
        ((4, 8),)
    """
    check_module(quantized, "quantized")
    model, _ = taken_ranges(plan, model)
    traced = Traced(model)
    check_model(plan, model, traced)
    original_model = as_planned(traced, plan)
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
        dynamic = dynamic_name(layer)
        problem = _problem(weight, integer_weight(original[name], layer), dynamic, original[name].dtype)
        if problem:
            problems.append(f"{name!r} {problem}")
        else:
            checks.append(LayerCheck.of(layer, str(cast(Any, weight).target_dtype), layer.activation_bits))
    weights = {weight_name(name) for layer in plan.layers for name in layer.names}
    problems += changed_state(quantized, original_model, weights)
    for layer in planned.values():
        kept = [name for name in layer.names if _module_weight(quantized, name) is stored.get(layer.name)]
        problems += [f"{name!r} is no longer tied to {layer.name!r}" for name in layer.tied if name not in kept]
    problems = problems or output_problems(quantized, plan, model, batch)
    if problems:
        raise VerifyError(f"{type(quantized).__name__} does not hold the plan: {first_few(problems)}")
    return tuple(checks)


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
    if tuple(weight.block_size) != block_size(expected) or weight.dtype != dtype:
        return f"has blocks of {tuple(weight.block_size)} in {weight.dtype}, the plan {block_size(expected)} in {dtype}"
    if weight.activation_quantization != activation_type(dynamic):
        return f"quantizes its input as {weight.activation_quantization}, the plan as {dynamic}"
    return None


def _same(stored: Tensor, expected: Tensor) -> bool:
    return stored.numel() == expected.numel() and stored.reshape(expected.shape).equal(expected)


def _plain(weight: Tensor) -> Tensor:
    return weight.dequantize() if isinstance(weight, IntxUnpackedToInt8Tensor) else weight


def _module_weight(model: nn.Module, name: str) -> Tensor:
    return cast(Tensor, model.get_submodule(name).weight)
