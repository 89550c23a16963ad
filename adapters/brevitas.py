"""A plan in Brevitas: its own quantized layers on the plan's grid, and all that Brevitas does with them afterwards.

    quantized = brevitas.to_brevitas(model, plan)           # a new model; weights equal mpq_plugins.apply's to the bit
    quantized = brevitas.gptq(quantized, batches)           # or gpfq, learned_round, correct_bias, train
    brevitas.verify(quantized, plan)                        # bit-widths read back from the Brevitas model
    brevitas.save(quantized, plan, "net.safetensors")       # the file carries its plan
    brevitas.export(quantized, plan, "net.onnx", images, format="onnx_qcdq")

Who calls Brevitas themselves gets a drop-in `compute_layer_map`:

    layerwise_quantize(model, compute_layer_map=brevitas.layer_map(plan, model))

Layers that the plan leaves in float stay torch's own. Scales are parameters that start at the plan's; zero points and
widths are fixed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

from brevitas import config
from brevitas.quant import ShiftedUint8ActPerTensorFloat
from torch import Tensor, nn

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import MismatchError, SettingError
from mpq_plugins.models.folding import conv_bn_pairs, folded_copy
from mpq_plugins.models.plain import HARMLESS, standard_class, why_not_plain
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.legalise import Capabilities, require_legal
from mpq_plugins.plans.names import weight_name
from mpq_plugins.plans.plan import Plan
from mpq_plugins.plans.scheme import Affine

from .brevitas_export import FORMATS, export
from .brevitas_files import load, save
from .brevitas_float import forget, mark
from .brevitas_graph import ModuleToModuleByInstance, brevitas_settings_kept
from .brevitas_layers import LAYERS
from .brevitas_quant import PlanBitWidth, bit_widths, weight_quantizer
from .brevitas_round import learned_round
from .brevitas_train import distillation, train
from .brevitas_tune import calibrate, correct_bias, gpfq, gptq
from .brevitas_verify import LayerCheck, verify
from .folded import (
    FLOAT,
    check_max_norm,
    check_model,
    check_plan,
    check_sizes,
    lent_weights,
    planned_by_name,
    planned_layers,
)

__all__ = [
    "CAPABILITIES", "FORMATS", "LayerCheck", "calibrate", "correct_bias", "distillation", "export", "gpfq", "gptq",
    "layer_map", "learned_round", "load", "save", "to_brevitas", "train", "verify",
]  # fmt: skip

CAPABILITIES = Capabilities(
    backend="brevitas",
    bits=tuple(range(1, 9)),
    kinds=(
        "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        "embedding",
    ),
    granularities=("per_tensor", "per_channel", "per_group"),
    parts=True,
    activation_bits=(None, *range(2, 9)),
)  # fmt: skip


# What every module keeps of itself.
MODULE_NAMES = {*vars(nn.Module())}


def to_brevitas(
    model: nn.Module, plan: Plan, activation_bits: int | None = None, *, ternary: str | Sequence[str] = ()
) -> nn.Module:
    """A copy of the model with Brevitas layers, whose quantized weights are the plan's to the bit.

    activation_bits: of the inputs of planned layers, 2 to 8, asymmetric per tensor; by default the plan's. It is short
    for a plan.with_activation_bits(...), which is the plan to verify, save and export by; `calibrate` sets the ranges.
    ternary: names of layers with 2 symmetric bits that become Brevitas's TernaryQuant, the same weights. BatchNorm is
    folded where the plan was measured so. A module under several names stays one, tied weights stay tied, and the model
    keeps its mode, training or not. Raises MismatchError (another model; a layer that its Brevitas twin would not
    replace, by name) and SettingError (a plan that Brevitas cannot run). Brevitas's global settings are left as they
    were.
    """
    check_plan(plan)
    plan = plan if activation_bits is None else plan.with_activation_bits(activation_bits)
    _check(plan, model)
    names = (ternary,) if isinstance(ternary, str) else ternary
    _check_ternary(plan, names)
    quantized = folded_copy(model, plan)
    with brevitas_settings_kept():
        config.IGNORE_MISSING_KEYS = True  # scales are the plan's, and not in the float model's state dict
        for layer in planned_layers(plan):
            quantized = _replace(quantized, layer, plan.activation_bits, layer.name in names)
    for module in quantized.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no fused kernel, which would take the float weights
    mark(quantized)
    quantized.register_load_state_dict_pre_hook(_before_loading)
    return quantized


def layer_map(plan: Plan, model: nn.Module | None = None) -> dict[type[nn.Module], tuple[type[nn.Module], Any]]:
    """The plan as `compute_layer_map` for Brevitas's `layerwise_quantize`, in which weights are the plan's to the bit.

    Brevitas skips what it does not find, changes the model in place, and goes by exact types: give `model` to have
    everything checked beforehand that would be skipped or lost. Without it only a layer that the plan does not know is
    refused, when Brevitas comes to it. A plan measured with BatchNorm folded wants the folded model, and so `model`.
    Raises MismatchError and SettingError as to_brevitas.
    """
    check_plan(plan)
    require_legal(plan, CAPABILITIES)
    if model is not None:
        _check(plan, model)
        _check_layerwise(plan, model)
    elif plan.fold_bn:
        raise SettingError(
            "the plan was measured with BatchNorm folded in: quantize fold_batch_norm(model), of "
            "mpq_plugins.models.folding, and give that model to layer_map too"
        )
    ignored, planned = config.IGNORE_MISSING_KEYS, planned_by_name(plan)

    def weight(module: nn.Module, name: str) -> type | None:
        try:
            layer = _planned(plan, planned, module, name)
            return None if layer is None else weight_quantizer(cast(Tensor, module.weight), layer)
        except Exception:  # whatever it is: layerwise_quantize has set this, and is about to fail
            config.IGNORE_MISSING_KEYS = ignored
            raise

    # Brevitas calls nothing but real lambdas of two arguments.
    inputs = activation_quantizer(plan.activation_bits)
    common = {"weight_quant": lambda module, name: weight(module, name)}
    more = common | {"input_quant": lambda module, name: inputs if name in planned else None}
    return {cls: (twin, common if cls is nn.Embedding else more) for cls, twin in LAYERS.items()}


def activation_quantizer(bits: int | None) -> type | None:
    """The injector for inputs: asymmetric, per tensor, its range the calibration's."""
    return None if bits is None else cast(type, ShiftedUint8ActPerTensorFloat.let(bit_width=bits))


def _replace(quantized: nn.Module, layer: LayerChoice, activation_bits: int | None, ternary: bool) -> nn.Module:
    """The model with Brevitas layers in the place of a planned layer, under all names of its weight."""
    made: dict[int, nn.Module] = {}
    for name in layer.names:
        old = quantized.get_submodule(name)
        if bit_widths(old) is not None:
            continue  # within a module of two names, and replaced already
        parent, _, own = name.rpartition(".")
        if id(old) in made:
            setattr(quantized.get_submodule(parent), own, made[id(old)])
            continue
        weight, trains = cast(nn.Parameter, old.weight), old.training
        standard = next(cls for cls in LAYERS if isinstance(old, cls))
        settings: dict[str, Any] = {"weight_quant": weight_quantizer(weight, layer, ternary)}
        if not isinstance(old, nn.Embedding):
            settings["input_quant"] = activation_quantizer(activation_bits)
        new = ModuleToModuleByInstance(old, LAYERS[standard], **settings).init_new_module(old, name)
        new.weight = weight
        for first in made.values():
            new.weight_quant = first.weight_quant
        made[id(old)] = new
        if getattr(old, "bias", None) is not None:
            new.bias = old.bias  # the parameter itself, frozen or not
        # Attributes that a user has set. Brevitas has put among them what the new layer registers, such as its bias.
        known = {*vars(new), *new._parameters, *new._buffers, *new._modules}
        vars(new).update({name: value for name, value in vars(old).items() if name not in known})
        new.train(trains)
        if old is quantized:
            root: nn.Module = new
            return root
        setattr(quantized.get_submodule(parent), own, new)
    return quantized


def _check(plan: Plan, model: nn.Module) -> None:
    check_model(plan, model)
    require_legal(plan, CAPABILITIES)
    check_max_norm(plan, model)
    check_sizes(plan, "brevitas")
    if config.JIT_ENABLED:
        raise SettingError("brevitas: BREVITAS_JIT=1 compiles its layers, and those of a plan cannot be: unset it")
    aside = _held_aside(model)
    problems = [problem for layer in planned_layers(plan) for problem in _troubles(layer, model, aside)]
    borrowed = lent_weights(model)
    problems += [
        f"{name!r} lends its weight to a functional call, which would take the float one: skip it"
        for name in planned_by_name(plan)
        if weight_name(name) in borrowed
    ]
    if problems:
        raise MismatchError(f"brevitas cannot run this plan on {type(model).__name__}: {first_few(problems)}")


def _troubles(layer: LayerChoice, model: nn.Module, aside: set[int]) -> Iterator[str]:
    for name in layer.names:
        module = model.get_submodule(name)
        own, weight = type(module).__name__, cast(Tensor, module.weight)
        if hasattr(module, "weight_quant"):
            yield f"{name!r} is quantized by Brevitas already: give the float model"
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            yield f"{name!r} is MultiheadAttention's own, which never calls it as a module: skip it"
        elif weight.dtype != FLOAT:
            yield f"{name!r} is {weight.dtype}, and Brevitas would round it otherwise: model.float(), or skip it"
        elif why_not_plain(module, hooks=False):
            yield f"{name!r} {why_not_plain(module, hooks=False)}, and its Brevitas twin as torch's class: skip it"
        elif _lost_names(module):
            yield f"{name!r} is a {own} whose {_lost_names(module)} its Brevitas twin would lack: skip it"
        elif {*module.state_dict()} - {"weight", "bias"} or [*module.children()]:
            yield f"{name!r} is a {own} with state of its own, which its Brevitas twin would lose: skip it"
        elif id(module) in aside:
            yield f"{name!r} is held in a list or attribute besides its name, and would stay in float there: skip it"
        elif module._forward_hooks or module._forward_pre_hooks:
            yield f"{name!r} has forward hooks, which its Brevitas twin would lose: remove them, or skip it"
    if layer.tied and layer.scheme.granularity == "per_group":
        yield f"{layer.name!r} shares its weight, and Brevitas does not share quantizers per group: skip it"


def _check_layerwise(plan: Plan, model: nn.Module) -> None:
    """What `layerwise_quantize` would skip, untie or leave behind without a word."""
    problems = []
    for layer in planned_layers(plan):
        modules = [model.get_submodule(name) for name in layer.names]
        if len(layer.names) > 1:
            problems.append(f"{layer.name!r} is {layer.tied[0]!r} too, which it would untie and leave in float")
        problems += [
            f"{name!r} is a {type(module).__name__}, and it goes by exact types"
            for name, module in zip(layer.names, modules, strict=True)
            if type(module) not in LAYERS
        ]
        parents = [model.get_submodule(name.rpartition(".")[0]) for name in layer.names]
        if "" in layer.names or any(isinstance(parent, nn.TransformerEncoderLayer) for parent in parents):
            problems.append(f"{layer.name!r} is the model itself or in a fused kernel's reach, and would stay in float")
    if plan.fold_bn and conv_bn_pairs(model, plan.skipped):
        problems.append("the plan was measured with BatchNorm folded in: fold_batch_norm(model) first")
    if problems:
        raise MismatchError(f"layerwise_quantize cannot take this plan: {first_few(problems)}. Use to_brevitas")


def _planned(plan: Plan, planned: dict[str, LayerChoice], module: nn.Module, name: str) -> LayerChoice | None:
    if name in plan.skipped:
        return None
    layer, shape = plan.by_any_name.get(name), tuple(cast(Tensor, module.weight).shape)
    if layer is None or shape != layer.shape:
        what = "is not in the plan" if layer is None else f"has shape {list(shape)}, the plan {list(layer.shape)}"
        raise MismatchError(
            f"layer {name!r}: {what}. The model is converted in part by now: build it anew, and give it to "
            "layer_map(plan, model) to have this checked beforehand"
        )
    return planned.get(name)


def _check_ternary(plan: Plan, ternary: Sequence[str]) -> None:
    names = [layer.name for layer in planned_layers(plan)]
    for name in ternary:
        if name not in names:
            raise SettingError(f"ternary: the plan quantizes no layer {name!r}; {first_few(names, ', ')}")
        layer = plan.by_name[name]
        assert isinstance(layer.scheme, Affine)
        if layer.bits != 2 or not layer.scheme.symmetric or layer.scheme.granularity == "per_group":
            raise SettingError(
                f"ternary: layer {name!r} has {layer.bits or 'mixed'} bits, {layer.scheme}; ternary weights are 2 "
                "symmetric bits, per tensor or per channel"
            )


def _lost_names(module: nn.Module) -> str:
    """What a subclass has for others to call, and torch's class, which its twin is made from, has not."""
    mro, standard = type(module).__mro__, standard_class(module)
    before = mro[: mro.index(standard)] if standard in mro else mro
    return ", ".join(sorted({name for cls in before for name in vars(cls)} - HARMLESS))


def _held_aside(model: nn.Module) -> set[int]:
    """The modules, by id, that a list, dict or plain attribute of some module holds, where replacing cannot reach."""
    found: set[int] = set()
    for module in model.modules():
        for name, value in vars(module).items():
            if name.startswith("_") and name in MODULE_NAMES:
                continue
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
            found |= {id(one) for one in held if isinstance(one, nn.Module)}
    return found


def _before_loading(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before anything is loaded: a checkpoint of another plan must not change half the model, nor old floats stay."""
    for name, child in module.named_modules():
        if isinstance(child, PlanBitWidth):
            child.check(state, f"{prefix}{name}.")
    forget(module)
