"""Does a model of the classic API hold what the plan says: weights to the bit, or int8 and fp32 where it says so."""

from typing import Any, cast

import torch
from torch import nn

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import VerifyError
from mpq_plugins.models.arguments import check_module
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.models.tracing import Traced
from mpq_plugins.plans.names import weight_name
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.verify import verify as verify_simulated

from ..contract import LayerCheck, class_name
from ..shared.folded import as_planned, changed_modules, changed_state, check_model, planned_by_name, planned_layers
from ..shared.outputs import output_problems

RUN_IN_INT8 = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")


@torch.no_grad()
def verify(quantized: Any, plan: Plan, model: nn.Module, *, batch: Any = None) -> tuple[LayerCheck, ...]:
    """Prove that what `fit` returned, or its module, holds the plan.

    Of weights alone: every weight is, to the bit, what the plan makes of the float model, all else the model's own. Of
    the static approach (the plan has 8-bit activations): the plan's 8-bit layers run in int8, the others in float;
    scales are the compressor's.

    Args:
        quantized: What `fit` returned, or its module.
        plan: The plan.
        model: The float model.
        batch: Inputs on which the outputs must be those of `mpq_plugins.apply`, within float rounding (1e-4 of their
            norm; in half precision 1e-2), or of the static approach within 5 %.

    Returns:
        A check for each planned layer.

    Raises:
        VerifyError: The model does not hold the plan. The message lists what is wrong.
        MismatchError: The plan is another model's.
        SettingError: The float model does not run on the batch.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import inc_classic
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=3)(mpq.measure(net))
        >>> inc_classic.verify(inc_classic.apply(net, plan), plan, net, batch=torch.ones(4, 8))[0].bits
        ((3, 8),)
    """
    module = cast(nn.Module, getattr(quantized, "model", quantized))
    check_module(module, "quantized")
    traced = Traced(model)
    check_model(plan, model, traced)
    if plan.quantizes_inputs:
        checks = verify_static(module, plan)
        _check_outputs(module, plan, model, batch)
        return checks
    verify_simulated(module, plan, model)
    original = as_planned(traced, plan)
    weights = {weight_name(name) for name in plan.by_any_name}
    changed = [*changed_state(module, original, weights), *changed_modules(module, original)]
    if changed:
        raise VerifyError(f"{type(module).__name__} does not hold the plan: {first_few(changed)}")
    _check_outputs(module, plan, model, batch)
    stored = quantizable_weights(module)
    return tuple(LayerCheck.of(layer, str(stored[layer.name].dtype)) for layer in planned_layers(plan))


def _check_outputs(module: nn.Module, plan: Plan, model: nn.Module, batch: Any) -> None:
    problems = output_problems(module, plan, model, batch)
    if problems:
        raise VerifyError(f"{type(module).__name__} does not hold the plan: {first_few(problems)}")


def verify_static(module: nn.Module, plan: Plan) -> tuple[LayerCheck, ...]:
    """That a converted module runs the plan's 8-bit layers, and no others, in int8. Raises VerifyError."""
    modules = dict(module.named_modules())
    wanted = {layer.name for layer in planned_by_name(plan).values()}
    problems = []
    checks = []
    for layer in plan.layers:
        # A convolution that was fused with what follows it, and stays in float, is its first part.
        stored = next((modules[name] for name in (f"{layer.name}.0", layer.name) if name in modules), None)
        int8 = type(stored).__module__.startswith(RUN_IN_INT8)
        if stored is None:
            problems.append(f"{layer.name!r} is missing")
        elif int8 != (layer.name in wanted):
            problems.append(f"{layer.name!r} runs in {'int8' if int8 else 'float'}, and the plan says otherwise")
        elif int8:
            checks.append(LayerCheck.of(layer, class_name(stored), layer.activation_bits))
    if problems:
        raise VerifyError(f"{type(module).__name__} does not hold the plan: {first_few(problems)}")
    return tuple(checks)
