"""Ranges of the inputs that a plan quantizes, found by running the float model on calibration inputs."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..common.checks import listed
from ..common.progress import Progress, check_callbacks
from ..common.text import first_few
from ..errors import SettingError
from ..models.arguments import check_module
from ..models.copying import duplicate
from ..models.input_ranges import (
    InputRange,
    holds,
    idle_quantizers,
    input_ranges,
    put_input_ranges,
    without_input_ranges,
)
from ..models.running import checked_batches, evaluating, run_model
from ..plans.activations import Activations
from ..plans.arguments import check_plan
from ..plans.plan import Plan
from ..quantization.input_values import InputValues
from .match import match

NEVER_CALLED = (nn.modules.linear.NonDynamicallyQuantizableLinear,)  # of MultiheadAttention, which uses its weight


def calibrate_inputs(
    model: nn.Module, plan: Plan, batches: Iterable[Any] = (), *, progress: Progress | None = None
) -> nn.Module:
    """Make a copy of the model that quantizes its layers' inputs as the plan says; weights stay as they are.

    Static ranges are found on the model as it is, each layer's by the plan's `range`. `apply`, `correct`, `compensate`
    and `evaluate` do this themselves where they have inputs.

    Args:
        model: The float model; it is not changed. Ranges that it carries are replaced.
        plan: The plan.
        batches: Inputs without labels, as for `correct`; none are needed where every range is dynamic.
        progress: Called with what is being done, how much of it is done and how much there is.

    Returns:
        The copy; `input_ranges` lists what it carries.

    Raises:
        SettingError: There are no batches, the model does not run on them, or a layer's inputs cannot be quantized: no
            batch reaches it, or they are all zero, NaN or infinite. The message names the layer.
        MismatchError: The plan is for another model.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(net)).with_activation_bits(8)
        >>> calibrated = mpq.calibrate_inputs(net, plan, [torch.randn(64, 8)])
        >>> mpq.input_ranges(calibrated)["0"].bits
        8
    """
    check_module(model)
    check_plan(plan)
    check_callbacks(progress=progress)
    plan = match(plan, model, rewrapped=True).require(type(model).__name__)
    copied = without_input_ranges(model)
    put_input_ranges(copied, found_ranges(copied, plan, batches, progress))
    return copied


def has_ranges(model: nn.Module, plan: Plan) -> bool:
    """Whether no batch is needed to quantize the inputs that the plan does: the model carries ranges, or all are
    dynamic."""
    if input_ranges(model):
        return True
    planned = [layer.activations for layer in plan.layers if layer.activations is not None]
    return all(activations.dynamic is not None for activations in planned)


def with_ranges(model: nn.Module, plan: Plan, batches: Iterable[Any]) -> nn.Module:
    """The model where it carries the plan's ranges, or the plan quantizes no input; else a copy with them.

    The plan has the model's own names. Raises SettingError as plans_ranges.
    """
    ranges = plans_ranges(model, plan, batches)
    if not ranges or input_ranges(model):
        return model
    copied = duplicate(model)
    put_input_ranges(copied, ranges)
    return copied


def plans_ranges(model: nn.Module, plan: Plan, batches: Iterable[Any]) -> dict[str, InputRange]:
    """The ranges that the model carries, or else those found on the batches; none where the plan quantizes no input.

    The plan has the model's own names. Raises SettingError for carried ranges that are other than the plan's.
    """
    carried = input_ranges(model)
    if not carried:
        return found_ranges(model, plan, batches) if plan.quantizes_inputs else {}
    problems = input_problems(model, plan)
    if problems:
        raise SettingError(
            f"{type(model).__name__}: carries ranges of inputs that are not the plan's ({first_few(problems)}); give "
            "mpq_plugins.without_input_ranges(model), which lets them be found anew"
        )
    return carried


def found_ranges(
    model: nn.Module, plan: Plan, batches: Iterable[Any], progress: Progress | None = None, *, uncalled: bool = False
) -> dict[str, InputRange]:
    """The ranges that the plan's activations get on the float model's inputs, by module name.

    The plan has the model's own names. uncalled: leave out layers that no batch calls, instead of refusing them. Raises
    SettingError as `calibrate_inputs`.
    """
    planned = _modules(model, plan, uncalled)
    ranges = {name: _dynamic(activations) for name, activations in planned.items()}
    static = {name: activations for name, activations in planned.items() if activations.dynamic is None}
    given = checked_batches(batches) if static else listed("batches", batches, "a list of batches")
    if not given:
        return ranges
    watched = {name: InputValues(name) for name in planned}
    with ExitStack() as stack, evaluating(model), torch.no_grad():
        for name, values in watched.items():
            stack.callback(values.watch(model.get_submodule(name)).remove)
        for position, batch in enumerate(given):
            if progress is not None:
                progress("calibrating inputs", position, len(given))
            run_model(model, batch)
    if progress is not None:
        progress("", len(given), len(given))
    reached = {name: values for name, values in watched.items() if values.batches or not uncalled}
    for values in reached.values():
        values.require_reached()
    ranges |= {name: watched[name].range(activations) for name, activations in static.items() if name in reached}
    return {name: own for name, own in ranges.items() if name in reached}


def input_problems(model: nn.Module, plan: Plan) -> list[str]:
    """How the inputs that a model quantizes differ from those that the plan does, each in words."""
    carried = input_ranges(model)
    planned = {name: layer.activations for name, layer in plan.by_any_name.items()}
    problems = [
        f"{name!r} has inputs of {_text(found)}, the plan {_planned_text(planned.get(name))}"
        for name, found in carried.items()
        if not holds(found, planned.get(name))
    ]
    problems += [f"{name!r} lets its input pass unquantized" for name in idle_quantizers(model)]
    bare = [layer for layer in plan.layers if layer.activations is not None and carried.keys().isdisjoint(layer.names)]
    return problems + [
        f"{layer.name!r} has float inputs, the plan {_planned_text(layer.activations)}" for layer in bare
    ]


def _modules(model: nn.Module, plan: Plan, uncalled: bool) -> Mapping[str, Activations]:
    """How the plan quantizes modules' inputs, each module once, by the first of its names.

    uncalled: leave out those that are never called.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[int, tuple[str, Activations]] = {}
    for layer in plan.layers:
        for name in layer.names if layer.activations is not None else ():
            assert layer.activations is not None
            why = "is no module" if name not in modules else ""
            if isinstance(modules.get(name), NEVER_CALLED):
                if uncalled:
                    continue
                why = "its weight is used without the layer being called"
            if why:
                raise SettingError(
                    f"layer {name!r}: {why}, so its input cannot be quantized; leave it in floating point "
                    f"(plan.with_activations({{{name!r}: None}}))"
                )
            if not isinstance(modules[name], nn.Embedding):  # which may share its weight, and takes indices
                found.setdefault(id(modules[name]), (name, layer.activations))
    return dict(found.values())


def _dynamic(activations: Activations) -> InputRange:
    return InputRange(activations.bits, dynamic=activations.dynamic, symmetric=activations.symmetric)


def _planned_text(activations: Activations | None) -> str:
    return "float ones" if activations is None else _text(_dynamic(activations))


def _text(found: InputRange) -> str:
    kind = found.dynamic or "static"
    return f"{found.bits} bits ({kind}{', symmetric' if found.symmetric else ''})"
