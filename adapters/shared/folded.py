"""What backends that fold BatchNorm themselves are given: the folded weights, and their integers."""

from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import MismatchError, SettingError
from mpq_plugins.models.arguments import check_module
from mpq_plugins.models.borrowed import borrowed_in_source
from mpq_plugins.models.folding import Folded, borrowed_weights, conv_bn_pairs, folding_factor, unfolded_norms
from mpq_plugins.models.input_ranges import refuse_input_ranges
from mpq_plugins.models.kinds import is_transformers_conv1d, layer_kind, quantizable_weights
from mpq_plugins.models.tracing import Traced
from mpq_plugins.plans.arguments import check_plan
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.legalise import require_legal
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.integers import IntegerWeight, integer_weight
from mpq_plugins.simulation.match import match
from mpq_plugins.simulation.model import float_copy, set_float16

FLOAT = torch.float32
INTEGER_SCHEMES = ("affine", "entropy_coded")
"""The schemes whose weights are integers times a scale, which backends of integer weights run."""


def check_types(plan: object, model: object) -> None:
    """Raise SettingError where a plan is no Plan, or a model no module."""
    check_plan(plan)
    check_module(model)


def check_model(plan: Plan, model: nn.Module, traced: Traced | None = None) -> None:
    """Refuse what is no plan or module, or quantizes inputs already (SettingError).

    Refuse another's plan, and planned layers of a class that no backend knows (MismatchError).
    """
    check_types(plan, model)
    refuse_input_ranges(model)
    match(plan, model, traced=traced).require(type(model).__name__)
    refuse_transformers_conv1d(plan, model)


def refuse_transformers_conv1d(plan: Plan, model: nn.Module) -> None:
    """Backends would leave these in floating point, or take their inputs for outputs."""
    planned = planned_by_name(plan)
    named = [repr(name) for name, module in model.named_modules() if name in planned and is_transformers_conv1d(module)]
    if named:
        raise MismatchError(
            f"{first_few(named, ', ')}: transformers' Conv1D, with weights (inputs, outputs), which no backend runs. "
            "Skip such layers, or use mpq_plugins.apply, which simulates them"
        )


def planned_layers(plan: Plan) -> list[LayerChoice]:
    """The layers that the plan does not leave in floating point."""
    return [layer for layer in plan.layers if not layer.in_float]


def planned_by_name(plan: Plan) -> dict[str, LayerChoice]:
    """The same by name, and by the tied names of their weights."""
    return {name: layer for layer in planned_layers(plan) for name in layer.names}


def has_float16(plan: Plan) -> bool:
    """Whether the plan has layers at 16 bits."""
    return any(layer.rounded_in_float for layer in plan.layers)


def as_planned(traced: Traced, plan: Plan) -> nn.Module:
    """The float model that a backend quantizes: BatchNorm folded as it was measured, layers at 16 bits in float16.

    The model itself where the plan asks for neither, a copy where it does. What a backend leaves in float computes, so,
    with the values of `mpq_plugins.apply`. Raises as `float_copy`.
    """
    return float_copy(traced, plan) if plan.fold_bn or has_float16(plan) else traced.model


def rounded_before(traced: Traced, plan: Plan) -> Traced:
    """The model that a backend folds: layers at 16 bits, measured unfolded, are in float16 before they are folded.

    A copy where the plan has such layers.
    """
    return Traced(float_copy(traced, plan)) if has_float16(plan) and not plan.fold_bn else traced


def round_after(folded: nn.Module, plan: Plan) -> None:
    """Round the layers at 16 bits of a folded copy to float16, where it is the folded weights that were measured."""
    if plan.fold_bn:
        set_float16(folded, plan)


def refuse_float16(plan: Plan, what: str, instead: str) -> None:
    """Refuse layers at 16 bits, which a backend's own call leaves as they are. Raises SettingError."""
    halves = [repr(layer.name) for layer in plan.layers if layer.rounded_in_float]
    if halves:
        raise SettingError(
            f"{first_few(halves, ', ')}: 16 bits, and {what} leaves weights in float as they are, not in float16. Pin "
            f"them to 32 bits, or use {instead}"
        )


def refuse_entropy_coded(plan: Plan, what: str, capabilities: str) -> None:
    """Refuse layers whose steps are the plan's, which a backend's own call knows nothing of. Raises SettingError."""
    coded = [repr(layer.name) for layer in planned_layers(plan) if layer.scheme.name == "entropy_coded"]
    if coded:
        raise SettingError(
            f"{first_few(coded, ', ')}: entropy-coded, and {what} finds scales of its own. Use apply(), which is "
            f"exact, or legalise(plan, {capabilities}), which makes them affine"
        )


def lent_weights(traced: Traced) -> set[str]:
    """Names of parameters that are used outside their layer, as torch.fx sees it or as the model's code says."""
    return borrowed_weights(traced) | borrowed_in_source(traced.model)


def folded_integers(plan: Plan, model: nn.Module) -> dict[str, IntegerWeight]:
    """Work out the integers of every planned layer, of the weights with BatchNorm folded in.

    Args:
        plan: The plan.
        model: The float model; it is not changed.

    Returns:
        Codes, scales and zero points by layer name.

    Raises:
        MismatchError: The plan is another model's.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> list(fx.folded_integers(mpq.Uniform(bits=4)(mpq.measure(net)), net))
        ['0']
    """
    check_types(plan, model)
    return integers_of(plan, Folded.of(model))


def integers_of(plan: Plan, folded: Folded) -> dict[str, IntegerWeight]:
    """The integers of every planned layer of a model that is folded already.

    Where the plan is of the weights as they were before, codes stay and scales follow the folding if folding would
    change codes: at a step that the plan has, and where weights are rounded stochastically.
    """
    weights = quantizable_weights(folded.model)
    integers = {}
    for layer in planned_layers(plan):
        if plan.fold_bn or not _hangs_on_values(layer):
            integers[layer.name] = integer_weight(weights[layer.name], layer)
        else:
            integers[layer.name] = _rescaled(layer, folded)
    return integers


def _hangs_on_values(layer: LayerChoice) -> bool:
    """Whether other codes come of a channel times a factor: its step is the plan's, or its values decide what is drawn.

    Where scales are found from the weights, they follow the factor, and rounding to nearest finds the same codes.
    """
    affine = layer.scheme.as_affine
    return not layer.scheme.scales_per_group or (affine is not None and affine.stochastic is not None)


def _rescaled(layer: LayerChoice, folded: Folded) -> IntegerWeight:
    original = folded.traced.model
    integers = integer_weight(cast(Tensor, original.get_submodule(layer.name).weight), layer)
    norm = next((folded.pairs[name] for name in layer.names if name in folded.pairs), None)
    return integers if norm is None else integers.rescaled(folding_factor(original.get_submodule(norm)))


def biases_of(model: nn.Module) -> dict[str, Tensor | None]:
    """The biases of all layers by name, under every name that a layer has."""
    named = model.named_modules(remove_duplicate=False)
    layers = [(name, module) for name, module in named if layer_kind(module)]
    return {name: cast("Tensor | None", getattr(module, "bias", None)) for name, module in layers}


def changed_state(quantized: nn.Module, model: nn.Module, weights: set[str]) -> list[str]:
    """What of the model's own biases, norms, buffers and float layers is another; `weights` are not looked at."""
    state = quantized.state_dict()
    return [
        f"{name!r} is not the model's own"
        for name, value in model.state_dict().items()
        if name not in weights and isinstance(value, Tensor) and not (name in state and state[name].equal(value))
    ]


def changed_modules(quantized: nn.Module, model: nn.Module, but: Collection[str] = ()) -> list[str]:
    """What of the model's modules is of another class, gone or added, and what of its buffers and state is not its own.

    `but`: modules that are another's by right, and all inside them.
    """
    inside = tuple(f"{name}." if name else "" for name in but)

    def spared(name: str) -> bool:
        return name in but or (bool(inside) and name.startswith(inside))

    wanted, theirs = (dict(net.named_modules(remove_duplicate=False)) for net in (model, quantized))
    problems = [
        f"{name!r} is a {type(theirs[name]).__name__ if name in theirs else 'gap'}, the model has a "
        f"{type(wanted[name]).__name__ if name in wanted else 'gap'} there"
        for name in (wanted.keys() | theirs.keys())
        if name and not spared(name) and type(wanted.get(name)) is not type(theirs.get(name))
    ]
    here, there = (dict(net.named_buffers(remove_duplicate=False)) for net in (model, quantized))
    buffers = [name for name in (here.keys() | there.keys()) if not spared(name.rpartition(".")[0])]
    problems += [
        f"{name!r} is not the model's own"
        for name in buffers
        if not (name in here and name in there and torch.equal(here[name], there[name]))
    ]
    added = quantized.state_dict().keys() - model.state_dict().keys()
    problems += [f"{name!r} is not the model's own" for name in added if not spared(name.rpartition(".")[0])]
    return sorted(dict.fromkeys(problems))


def check_folding(plan: Plan, traced: Traced, backend: str) -> None:
    """Refuse what a backend's own folding of BatchNorm would corrupt, planned or not.

    That is every layer that feeds a BatchNorm which cannot be folded into it (it feeds something else too, is called
    twice, shares its weight or the BatchNorm, has groups and is transposed; the BatchNorm keeps no statistics); and
    per-tensor layers that were measured unfolded, for folding changes their scale. Also weights that are not float32,
    and models in training mode. Raises MismatchError or SettingError.
    """
    check_sizes(plan, backend)
    check_state(traced.model, backend)
    refuse_wrong_pairs(unfolded_norms(traced), backend)
    check_scales(plan, traced, backend)


def check_state(model: nn.Module, backend: str) -> None:
    """Refuse models in training mode, and weights that are not float32. Raises SettingError."""
    if any(module.training for module in model.modules()):
        raise SettingError(f"{backend}: {type(model).__name__} is in training mode, or a part of it; call model.eval()")
    other = [
        f"{name!r} ({weight.dtype})" for name, weight in quantizable_weights(model).items() if weight.dtype != FLOAT
    ]
    if other:
        raise SettingError(
            f"{backend}: quantizes float32 weights alone, not {first_few(other, ', ')}; call model.float()"
        )


def check_scales(plan: Plan, traced: Traced, backend: str) -> None:
    """Refuse per-tensor layers that were measured unfolded, for folding changes their scale. Raises MismatchError."""
    pairs = {} if plan.fold_bn else conv_bn_pairs(traced)
    unfolded = [
        f"{layer.name!r}"
        for layer in planned_layers(plan)
        if layer.name in pairs and layer.scheme.granularity == "per_tensor"
    ]
    if unfolded:
        raise MismatchError(
            f"{first_few(unfolded, ', ')}: measured unfolded, and {backend} folds BatchNorm, which changes the scale "
            "of a whole tensor: measure(model, fold_bn=True), or per_channel"
        )


def refuse_wrong_pairs(pairs: Mapping[str, str], backend: str) -> None:
    """Raise MismatchError for layers that feed a BatchNorm which a backend would fold into them, and may not."""
    wrong = [f"{name!r} feeds the BatchNorm {norm!r}" for name, norm in pairs.items()]
    if wrong:
        raise MismatchError(
            f"{first_few(wrong, ', ')} but is no pair with it (a linear layer, or it feeds something else, or one of "
            f"them is used twice), and {backend} would fold them all the same and corrupt it: give each its own, or "
            "use mpq_plugins.apply or the torchao adapter, which do not fold"
        )


def check_sizes(plan: Plan, backend: str) -> None:
    """Refuse planned layers without weights, which backends fail on. Raises MismatchError."""
    empty = [f"{layer.name!r} {list(layer.shape)}" for layer in planned_layers(plan) if 0 in layer.shape]
    if empty:
        raise MismatchError(f"{first_few(empty, ', ')}: no weights there, which {backend} cannot quantize: skip it")


def check_max_norm(plan: Plan, model: nn.Module) -> None:
    """Refuse an embedding that changes its own weight as it runs. Raises MismatchError."""
    for layer in planned_layers(plan):
        if getattr(model.get_submodule(layer.name), "max_norm", None) is not None:
            raise MismatchError(f"{layer.name!r} has max_norm, which changes its weight as it runs: skip it")


def check_runnable(plan: Plan, traced: Traced, capabilities: Capabilities) -> None:
    """What several backends refuse alike. Raises as check_model, require_legal and check_max_norm, in that order."""
    check_model(plan, traced.model, traced)
    require_legal(plan, capabilities)
    check_max_norm(plan, traced.model)
