"""What Brevitas can run, and what it would get wrong without a word: refused by name."""

from collections.abc import Iterator, Sequence
from typing import cast

from brevitas import config
from torch import Tensor, nn

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import MismatchError, SettingError
from mpq_plugins.models.plain import HARMLESS, standard_class, why_not_plain
from mpq_plugins.models.tracing import Traced
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.names import weight_name
from mpq_plugins.plans.plan import Plan
from mpq_plugins.plans.storage import Storage

from ..shared.folded import (
    FLOAT,
    INTEGER_SCHEMES,
    check_runnable,
    check_sizes,
    lent_weights,
    planned_by_name,
    planned_layers,
)
from ..shared.input_ranges import taken_ranges

CAPABILITIES = Capabilities(
    backend="brevitas",
    bits=tuple(range(1, 9)),
    kinds=(
        "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        "embedding",
    ),
    schemes=INTEGER_SCHEMES,
    granularities=("per_tensor", "per_channel", "per_group"),
    parts=True,
    activation_bits=(None, *range(2, 9)),
    input_symmetric=(False, True),
    storage=Storage("weights in floating point, which an export turns into codes"),
    stochastic=False,
)  # fmt: skip
# What every module keeps of itself.
MODULE_NAMES = {*vars(nn.Module())}


def check(plan: Plan, model: nn.Module) -> None:
    """Check that Brevitas can run the plan on the model.

    Args:
        plan: The plan.
        model: The float model; it is not changed.

    Raises:
        SettingError: Brevitas cannot run the plan. The message names layers and the remedy.
        MismatchError: The plan is another model's, or Brevitas cannot run the model.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import brevitas
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> brevitas.check(mpq.Uniform(bits=3)(mpq.measure(net)), net)
    """
    bare, _ = taken_ranges(plan, model)
    check_traced(plan, Traced(bare))


def check_traced(plan: Plan, traced: Traced) -> None:
    """The same of a model that what follows asks for its graph too."""
    model = traced.model
    check_runnable(plan, traced, CAPABILITIES)
    check_sizes(plan, "brevitas")
    if config.JIT_ENABLED:
        raise SettingError("brevitas: BREVITAS_JIT=1 compiles its layers, and those of a plan cannot be: unset it")
    aside = _held_aside(model)
    problems = [problem for layer in planned_layers(plan) for problem in _troubles(layer, model, aside)]
    borrowed = lent_weights(traced)
    problems += [
        f"{name!r} lends its weight to a functional call, which would take the float one: skip it"
        for name in planned_by_name(plan)
        if weight_name(name) in borrowed
    ]
    if problems:
        raise MismatchError(f"brevitas cannot run this plan on {type(model).__name__}: {first_few(problems)}")


def _troubles(layer: LayerChoice, model: nn.Module, aside: set[int]) -> Iterator[str]:
    for name in layer.names:
        module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        problem = _unfit(module, parent) or _lost(module, aside)
        if problem:
            yield f"{name!r} {problem}"
    if layer.tied and layer.scheme.granularity == "per_group":
        yield f"{layer.name!r} shares its weight, and Brevitas does not share quantizers per group: skip it"


def _unfit(module: nn.Module, parent: nn.Module) -> str | None:
    """Why Brevitas would not quantize a layer, or to other values."""
    weight = cast(Tensor, module.weight)
    if hasattr(module, "weight_quant"):
        return "is quantized by Brevitas already: give the float model"
    if isinstance(parent, nn.MultiheadAttention):
        return "is MultiheadAttention's own, which never calls it as a module: skip it"
    if weight.dtype != FLOAT:
        return f"is {weight.dtype}, and Brevitas would round it otherwise: model.float(), or skip it"
    return None


def _lost(module: nn.Module, aside: set[int]) -> str | None:
    """What of a layer its Brevitas twin would lack, or not stand in for."""
    kind = type(module).__name__
    if why := why_not_plain(module, hooks=False):
        return f"{why}, and its Brevitas twin as torch's class: skip it"
    if names := lost_names(module):
        return f"is a {kind} whose {names} its Brevitas twin would lack: skip it"
    if {*module.state_dict()} - {"weight", "bias"} or [*module.children()]:
        return f"is a {kind} with state of its own, which its Brevitas twin would lose: skip it"
    if id(module) in aside:
        return "is held in a list or attribute besides its name, and would stay in float there: skip it"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks, which its Brevitas twin would lose: remove them, or skip it"
    return None


def check_ternary(plan: Plan, ternary: Sequence[str]) -> None:
    """Raise SettingError for a layer that cannot have the codes -1, 0 and 1."""
    names = [layer.name for layer in planned_layers(plan)]
    for name in ternary:
        if name not in names:
            raise SettingError(f"ternary: the plan quantizes no layer {name!r}; {first_few(names, ', ')}")
        layer = plan.by_name[name]
        scheme = layer.scheme.as_affine
        assert scheme is not None
        fits = layer.bits == 2 and scheme.symmetric and scheme.granularity != "per_group"
        if not fits or layer.scheme.name == "entropy_coded":  # which rounds otherwise
            raise SettingError(
                f"ternary: layer {name!r} has {layer.bits or 'mixed'} bits, {layer.scheme}; ternary weights are 2 "
                "symmetric affine bits, per tensor or per channel"
            )


def lost_names(module: nn.Module) -> str:
    """What a subclass has for others to call, and torch's class, which its twin is made from, has not."""
    mro, standard = type(module).__mro__, standard_class(module)
    before = mro[: mro.index(standard)] if standard in mro else mro
    return ", ".join(sorted({name for cls in before for name in vars(cls)} - HARMLESS))


def _held_aside(model: nn.Module) -> set[int]:
    """The modules, by id, that a list, dict or plain attribute of some module holds, where replacing cannot reach."""
    ids: set[int] = set()
    for module in model.modules():
        for name, value in vars(module).items():
            if name.startswith("_") and name in MODULE_NAMES:
                continue
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
            ids |= {id(one) for one in held if isinstance(one, nn.Module)}
    return ids
