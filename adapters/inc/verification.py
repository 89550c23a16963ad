"""Does a model that Neural Compressor quantized hold what the plan says: weights to the bit, or packed codes."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import VerifyError
from mpq_plugins.models.arguments import check_module
from mpq_plugins.models.kinds import layer_kind
from mpq_plugins.models.tracing import Traced
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.integers import IntegerWeight, integer_weight
from mpq_plugins.simulation.layer import simulate_layer

from ..contract import LayerCheck
from ..shared.compressor_quiet import quiet_import
from ..shared.folded import as_planned, changed_modules, changed_state, check_model, planned_by_name
from ..shared.outputs import output_problems

with quiet_import():
    from neural_compressor.torch.algorithms.weight_only.modules import WeightOnlyLinear

CODES_PER_TIE = 10_000
PACKED = "packed"  # how a check names what WeightOnlyLinear stores
SLACK = 0.25  # of a level: what float16 does to a scale and to a weight of 8 bits, doubled


@torch.no_grad()
def verify(quantized: nn.Module, plan: Plan, model: nn.Module, *, batch: Any = None) -> tuple[LayerCheck, ...]:
    """Compare every layer with what the plan makes of the float model, and all else with the model's own.

    Weights must be the plan's to the bit, tied ones under each of their names. Where Neural Compressor has packed a
    layer (`to_inc`), the weights that it computes with must be the plan's as float16 has them. Its arithmetic differs
    in the last bit, so a weight in the middle between two levels may go to the other one: one in 10,000 may, and is
    counted.

    Args:
        quantized: The quantized model.
        plan: The plan.
        model: The float model.
        batch: Inputs on which the outputs must be those of `mpq_plugins.apply`, within float rounding (1e-4 of their
            norm; packed or in half precision 1e-2).

    Returns:
        A check for each planned layer.

    Raises:
        VerifyError: The model does not hold the plan. The message lists what is wrong.
        MismatchError: The plan is another model's.
        SettingError: The float model does not run on the batch.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import inc
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=3)(mpq.measure(net))
        >>> inc.verify(inc.apply(net, plan), plan, net, batch=torch.ones(4, 8))[0].bits
        ((3, 8),)
    """
    check_module(quantized, "quantized")
    traced = Traced(model)
    check_model(plan, model, traced)
    original = as_planned(traced, plan)
    planned = planned_by_name(plan)
    wanted = {name: m for name, m in original.named_modules(remove_duplicate=False) if layer_kind(m)}
    modules = {name: m for name, m in quantized.named_modules(remove_duplicate=False) if _is_layer(m)}
    problems = [f"{name!r} is missing" for name in wanted if name not in modules]
    problems += [f"{name!r} is not a layer of the model's" for name in modules if name not in wanted]
    checks: list[LayerCheck] = []
    for name in (name for name in wanted if name in modules):
        layer, module = planned.get(name), modules[name]
        problem, ties = _problem(module, wanted[name], layer)
        if problem:
            problems.append(f"{name!r} {problem}")
        elif layer is not None and name == layer.name:
            stored = PACKED if isinstance(module, WeightOnlyLinear) else str(cast(Tensor, module.weight).dtype)
            checks.append(LayerCheck.of(layer, stored, ties=ties))
    packed = [name for name, module in modules.items() if isinstance(module, WeightOnlyLinear)]
    seen = {_in(name, parameter) for name in wanted for parameter in ("weight", *(("bias",) if name in packed else ()))}
    problems += changed_state(quantized, original, seen)
    problems += changed_modules(quantized, original, packed)
    weights = {name: getattr(module, "weight", None) for name, module in modules.items()}
    for layer in plan.layers:
        lost = [name for name in layer.tied if weights.get(name) is not weights.get(layer.name)]
        problems += [f"{name!r} is no longer tied to {layer.name!r}" for name in lost]
    problems = problems or output_problems(quantized, plan, model, batch, packed=bool(packed))
    if problems:
        raise VerifyError(f"{type(quantized).__name__} does not hold the plan: {first_few(problems)}")
    return tuple(checks)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, WeightOnlyLinear) or layer_kind(module) is not None


def _in(layer: str, parameter: str) -> str:
    return f"{layer}.{parameter}" if layer else parameter


def _problem(module: nn.Module, original: nn.Module, layer: LayerChoice | None) -> tuple[str, int]:
    """What is wrong with a layer, in words, if anything; and how many packed codes are ties."""
    weight = cast(Tensor, original.weight)
    if isinstance(module, WeightOnlyLinear):
        if layer is None:
            return "is packed, and the plan leaves it in float", 0
        bias = cast("Tensor | None", getattr(original, "bias", None))
        return _packed_problem(module, integer_weight(weight, layer), layer.bits, bias)
    stored = module.weight
    made = weight if layer is None else simulate_layer(weight, layer)
    same = isinstance(stored, Tensor) and stored.shape == made.shape and (stored.is_meta or stored.equal(made))
    return "" if same and type(module) is type(original) else "is not what the plan makes of the model's", 0


def _packed_problem(module: Any, expected: IntegerWeight, bits: int | None, bias: Tensor | None) -> tuple[str, int]:
    """How a packed layer differs from the plan's integers, in words, if it does; and how many ties went elsewhere."""
    if module.bits != bits:
        return f"is packed at {module.bits} bits, the plan has {bits}", 0
    weight = module.recover().float()
    if weight.shape != expected.codes.shape:
        return f"has shape {list(weight.shape)}, the plan {list(expected.codes.shape)}", 0
    if not weight.isfinite().all():
        return "has weights beyond float16, which Neural Compressor keeps scales in; use apply()", 0
    group = expected.codes.shape[1] // expected.scale.shape[1]
    levels_off = (weight - expected.dequantized()).abs() / expected.scale.repeat_interleave(group, 1)
    ties = int((levels_off > SLACK).sum())
    between = ((levels_off > SLACK) & ((levels_off - 1).abs() > SLACK)).any()
    if between or ties > max(1, weight.numel() // CODES_PER_TIE):
        return f"has {ties} of {weight.numel()} weights that are not the plan's, in float16; use apply()", ties
    if bias is not None and not _same_in_half(module.bias, bias):
        return "has another bias, or one beyond float16", ties
    return "", ties


def _same_in_half(stored: object, bias: Tensor) -> bool:
    return isinstance(stored, Tensor) and bool(stored.isfinite().all()) and torch.equal(stored, bias.to(stored.dtype))
