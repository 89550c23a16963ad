"""A plan in Brevitas: its own quantized layers on the plan's grid, and all that Brevitas does with them afterwards."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

from brevitas import config
from brevitas.quant import ShiftedUint8ActPerTensorFloat
from torch import nn

from mpq_plugins.common.checks import words
from mpq_plugins.models.tracing import Traced
from mpq_plugins.plans.arguments import check_plan
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.model import float_copy

from ..shared.batches import needed_batches
from ..shared.folded import planned_layers
from ..shared.input_ranges import taken_ranges
from .batches import Batch
from .checks import check_ternary, check_traced
from .float_weights import forget, mark
from .graph import ModuleToModuleByInstance, brevitas_settings_kept
from .layers import LAYERS
from .quantizers import PlanBitWidth, bit_widths, weight_quantizer
from .read import input_quantizers, is_calibrated, set_input_range
from .tuning import calibrate


def to_brevitas(
    model: nn.Module, plan: Plan, activation_bits: int | None = None, *, ternary: str | Sequence[str] = ()
) -> nn.Module:
    """Make a copy of the model with Brevitas layers, whose quantized weights are the plan's to the bit.

    BatchNorm is folded where the plan was measured so. A module under several names stays one, tied weights stay tied,
    and the model keeps its mode, training or not. Brevitas's global settings are left as they were. Ranges of inputs
    that the model carries are taken; tuning and training may learn on from them.

    Args:
        model: The float model; it is not changed.
        plan: The plan.
        activation_bits: Bits of the inputs of planned layers, 2 to 8, asymmetric per tensor; by default what the plan
            says of each. It is short for a plan.with_activation_bits(...), which is the plan to verify, save and export
            by; `calibrate` sets the ranges.
        ternary: Names of layers with 2 symmetric bits that become Brevitas's TernaryQuant, the same weights.

    Returns:
        The copy.

    Raises:
        MismatchError: The plan is another model's, or a layer's Brevitas twin would not replace it. The message names
            it.
        SettingError: Brevitas cannot run the plan.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import brevitas
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> quantized = brevitas.to_brevitas(net, mpq.Uniform(bits=3)(mpq.measure(net)))
        >>> int(quantized[0].quant_weight().bit_width)
        3
    """
    check_plan(plan)
    plan = plan if activation_bits is None else plan.with_activation_bits(activation_bits)
    model, ranges = taken_ranges(plan, model)
    traced = Traced(model)
    check_traced(plan, traced)
    names = (ternary,) if isinstance(ternary, str) else words("ternary", ternary, "a list of layers' names")
    check_ternary(plan, names)
    quantized = float_copy(traced, plan)
    with brevitas_settings_kept():
        config.IGNORE_MISSING_KEYS = True  # scales are the plan's, and not in the float model's state dict
        for layer in planned_layers(plan):
            quantized = _replace(quantized, layer, layer.name in names)
    for module in quantized.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no fused kernel, which would take the float weights
    for name, own in ranges.items():
        set_input_range(quantized.get_submodule(name), own)
    mark(quantized)
    quantized.register_load_state_dict_pre_hook(_before_loading)
    return quantized


def apply(model: nn.Module, plan: Plan, batches: Iterable[Batch] = ()) -> nn.Module:
    """Make a copy by `to_brevitas`, and with quantized activations `calibrate` it, which gives evaluation mode.

    A model that carries the ranges needs no calibration, and keeps its mode.

    Args:
        model: The float model; it is not changed.
        plan: The plan.
        batches: Inputs that set the ranges of quantized activations.

    Returns:
        The copy.

    Raises:
        SettingError: Brevitas cannot run the plan, or activations are to be quantized and there are no batches.
        MismatchError: As `to_brevitas`.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import brevitas
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=3)(mpq.measure(net))
        >>> torch.equal(brevitas.apply(net, plan)[0].quant_weight().value, mpq.apply(net, plan)[0].weight)
        True
    """
    quantized = to_brevitas(model, plan)
    if all(is_calibrated(quantized.get_submodule(name)) for name in input_quantizers(quantized)):
        return quantized  # there are none, or the model carries their ranges
    return calibrate(quantized, needed_batches(batches, "the plan's quantized activations take their ranges by them"))


def activation_quantizer(bits: int | None) -> type | None:
    """The injector for inputs: asymmetric, per tensor, its range the calibration's."""
    return None if bits is None else cast(type, ShiftedUint8ActPerTensorFloat.let(bit_width=bits))


def _replace(quantized: nn.Module, layer: LayerChoice, ternary: bool) -> nn.Module:
    """The model with Brevitas layers in the place of a planned layer, under all names of its weight."""
    made: dict[int, nn.Module] = {}
    for name in layer.names:
        old = quantized.get_submodule(name)
        if bit_widths(old) is not None:
            continue  # within a module of two names, and replaced already
        parent, _, last = name.rpartition(".")
        if id(old) in made:
            setattr(quantized.get_submodule(parent), last, made[id(old)])
            continue
        weight, trains = cast(nn.Parameter, old.weight), old.training
        standard = next(cls for cls in LAYERS if isinstance(old, cls))
        settings: dict[str, Any] = {"weight_quant": weight_quantizer(weight, layer, ternary)}
        if not isinstance(old, nn.Embedding):
            settings["input_quant"] = activation_quantizer(layer.activation_bits)
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
        setattr(quantized.get_submodule(parent), last, new)
    return quantized


def _before_loading(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before anything is loaded: a checkpoint of another plan must not change half the model, nor old floats stay."""
    for name, child in module.named_modules():
        if isinstance(child, PlanBitWidth):
            child.check(state, f"{prefix}{name}.")
    forget(module)
