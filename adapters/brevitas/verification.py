"""What a Brevitas model holds, read back from it, against what the plan says."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from brevitas.core.quant import BinaryQuant, TernaryQuant
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from torch import Tensor, nn

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import VerifyError
from mpq_plugins.models.arguments import check_module
from mpq_plugins.models.kinds import layer_kind
from mpq_plugins.models.tracing import Traced
from mpq_plugins.plans.arguments import check_plan
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.names import weight_name
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.integers import integer_weight

from ..contract import LayerCheck
from ..shared.folded import as_planned, changed_state, check_model, planned_by_name, planned_layers
from ..shared.input_ranges import Ranges, same_range, taken_ranges
from ..shared.outputs import output_problems
from .graph import quiet_state_dict
from .quantizers import channel_bits
from .read import WeightCodes, input_bits, input_range, is_calibrated, is_quantized, weight_codes


def verify(quantized: nn.Module, plan: Plan, model: nn.Module, *, batch: Any = None) -> tuple[LayerCheck, ...]:
    """Read bit-widths back, and compare every weight with what the plan makes of the float model, to the bit.

    Layers' settings, biases, norms and what the plan leaves in float must be the model's. Planned layers must quantize
    their inputs to the plan's bits, if it has any, in ranges that the model carries or calibration found; nothing else
    may be quantized. After GPTQ, GPFQ, learned rounding and training use verify_tuned.

    Args:
        quantized: The Brevitas model.
        plan: The plan.
        model: The float model.
        batch: Inputs on which the outputs must be those of `mpq_plugins.apply`, within float rounding (1e-4 of their
            norm), or with quantized activations within 5 % at 8 bits, twice that for each bit less.

    Returns:
        A check for each planned layer.

    Raises:
        VerifyError: The model does not hold the plan. The message lists what is wrong.
        MismatchError: The plan is another model's.
        SettingError: The float model does not run on the batch.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import brevitas
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=3)(mpq.measure(net))
        >>> brevitas.verify(brevitas.apply(net, plan), plan, net)[0].bits
        ((3, 8),)
    """
    check_module(quantized, "quantized")
    bare, ranges = taken_ranges(plan, model)
    traced = Traced(bare)
    check_model(plan, bare, traced)
    _require_ranges(quantized, ranges)
    return _verified(quantized, plan, traced, batch)


def verify_tuned(quantized: nn.Module, plan: Plan) -> tuple[LayerCheck, ...]:
    """Read bit-widths back, and whether every weight lies on a grid that the plan allows, whatever was tuned.

    Inputs are looked at as in `verify`.

    Args:
        quantized: The Brevitas model.
        plan: The plan.

    Returns:
        A check for each planned layer.

    Raises:
        VerifyError: The model does not hold the plan. The message lists what is wrong.
    """
    check_plan(plan)
    check_module(quantized, "quantized")
    return _verified(quantized, plan, None, None)


def _require_ranges(quantized: nn.Module, ranges: Ranges) -> None:
    """Raise VerifyError where an input has another range than the float model carries for it."""
    modules = dict(quantized.named_modules(remove_duplicate=False))
    found = {name: input_range(modules[name]) for name in ranges if name in modules and input_bits(modules[name])}
    problems = [
        f"{name!r} has its input in another range than the model carries: {own}, {ranges[name]}"
        for name, own in found.items()
        if own is None or not same_range(own, ranges[name])
    ]
    if problems:
        raise VerifyError(f"{type(quantized).__name__} does not hold the plan: {first_few(problems)}")


def _verified(quantized: nn.Module, plan: Plan, traced: Traced | None, batch: Any) -> tuple[LayerCheck, ...]:
    original = None if traced is None else as_planned(traced, plan)
    planned = planned_by_name(plan)
    modules = {name: module for name, module in quantized.named_modules(remove_duplicate=False) if layer_kind(module)}
    problems = [f"{name!r} is missing" for name in planned if name not in modules]
    checks: dict[str, LayerCheck] = {}
    for name, layer in planned.items():
        module = modules.get(name)
        float_layer = None if original is None else original.get_submodule(name)
        wrong = [] if module is None else [*_problems(module, layer, float_layer)]
        problems += [f"{name!r} {problem}" for problem in wrong]
        if module is not None and not wrong and layer.name not in checks:
            checks[layer.name] = _check(module, layer)
    problems += _quantized_besides(quantized, {id(modules[name]) for name in planned if name in modules})
    for layer in planned_layers(plan):
        tensors = {id(modules[name].weight) for name in layer.names if name in modules}
        if len(tensors) > 1:
            problems.append(f"{layer.name!r} is no longer tied to {layer.tied[0]!r}")
    if original is not None:
        with quiet_state_dict():
            weights = {weight_name(name) for name in planned}
            problems += changed_state(quantized, original, weights)
    if traced is not None:
        problems = problems or output_problems(quantized, plan, traced.model, batch)
    if problems:
        raise VerifyError(f"{type(quantized).__name__} does not hold the plan: {first_few(problems)}")
    return tuple(checks.values())


def _check(module: nn.Module, layer: LayerChoice) -> LayerCheck:
    quantizer = cast(Any, module).weight_quant.tensor_quant
    kind = (
        "binary" if isinstance(quantizer, BinaryQuant) else "ternary" if isinstance(quantizer, TernaryQuant) else "int"
    )
    return LayerCheck.of(layer, kind, input_bits(module), input_range=input_range(module))


def _problems(module: nn.Module, layer: LayerChoice, original: nn.Module | None) -> Iterator[str]:
    if not is_quantized(module):
        yield f"was left in float ({type(module).__name__})"
        return
    read = weight_codes(module)
    problem = _width_problem(read, layer) or _grid_problem(module, read, layer)
    if problem is not None:
        yield problem
    elif original is not None:
        if not _same(read.value, integer_weight(cast(Tensor, original.weight), layer).dequantized()):
            yield "has weights that are not the plan's (after tuning, call verify_tuned)"
        if module.extra_repr() != original.extra_repr():
            yield f"is ({module.extra_repr()}), in the model ({original.extra_repr()})"
    bias = getattr(module, "bias", None)
    if bias is not None and not torch.isfinite(bias).all():
        yield "has a bias that is NaN or infinite"
    inputs = layer.activation_bits
    if input_bits(module) != inputs:
        yield f"takes its input at {_width(input_bits(module))}, the plan {_width(inputs)}{_remedy(module)}"
    elif inputs is not None and not is_calibrated(module):
        yield "has not had its input calibrated: call calibrate"
    elif inputs is not None and not torch.isfinite(cast(Any, module).input_quant.scale()).all():
        yield "has an input range that is NaN or infinite: calibrate on other batches"


def _width_problem(read: WeightCodes, layer: LayerChoice) -> str | None:
    expected = channel_bits(layer)
    stored = read.bits.float().flatten()
    if stored.numel() == 1:
        stored = stored.expand(layer.channels)
    elif read.bits.dim() > len(layer.shape):  # one for each group
        by_channel = read.bits.movedim(0 if layer.channel_axis == 0 else 2, 0)
        stored = by_channel.reshape(layer.channels, -1)[:, 0].float()
    if stored.shape != expected.shape or not stored.cpu().equal(expected):
        have, want = (sorted({int(b) for b in bits}) for bits in (stored, expected))
        detail = "" if have != want else " in other channels"
        return f"has {_listed(have)} bits{detail}, the plan {_listed(want)}"
    return None


def _grid_problem(module: nn.Module, read: WeightCodes, layer: LayerChoice) -> str | None:
    scheme = layer.scheme.as_affine
    assert scheme is not None
    one_scale = scheme.granularity == "per_tensor" and layer.bits is not None
    groups = 1 if one_scale else scheme.groups_per_channel(layer.shape, layer.channel_axis, layer.name)
    expected = 1 if one_scale else layer.channels * max(1, groups)
    if read.scale.numel() != expected:
        return f"has {read.scale.numel()} scales, the plan {expected}"
    if not torch.isfinite(read.value).all():
        return "has weights that are NaN or infinite"
    if (scheme.symmetric or layer.bits == 1) and read.zero_point.any():
        return "has zero points, and the plan's scheme is symmetric"
    exact = (read.codes - read.zero_point) * read.scale
    signed = int(bool(cast(Any, module).weight_quant.is_signed))
    low = -(2 ** (read.bits - 1)) if signed else torch.zeros_like(read.bits)
    high = 2 ** (read.bits - signed) - 1
    inside = (read.codes >= low) & (read.codes <= high)
    binary = (read.codes - read.zero_point).abs() <= 1
    ok = torch.where(read.bits == 1, binary, inside) & (exact == read.value)
    return None if ok.all() else f"has {int((~ok).sum())} weights off the levels that its bits allow"


def _quantized_besides(quantized: nn.Module, planned: set[int]) -> list[str]:
    """Quantizers that the plan knows nothing of."""
    of_planned = {id(child) for module in quantized.modules() if id(module) in planned for child in module.modules()}
    return [
        f"{name!r} is quantized, and the plan leaves it in float"
        for name, module in quantized.named_modules()
        if id(module) not in of_planned and (is_quantized(module) or _is_quantizing_activations(module))
    ]


def _is_quantizing_activations(module: nn.Module) -> bool:
    return isinstance(module, ActQuantProxyFromInjectorBase) and bool(module.is_quant_enabled)


def _same(value: Tensor, expected: Tensor) -> bool:
    return value.numel() == expected.numel() and value.detach().cpu().reshape(expected.shape).equal(expected.cpu())


def _width(bits: int | None) -> str:
    return "floating point" if bits is None else f"{bits} bits"


def _remedy(module: nn.Module) -> str:
    bits = input_bits(module)
    return "" if bits is None else f" (if that is meant: plan.with_activation_bits({bits}))"


def _listed(bits: list[int]) -> str:
    return ", ".join(map(str, bits))
