"""A plan as the map from layers to layers that Brevitas's own conversion takes."""

from typing import Any, cast

from brevitas import config
from torch import Tensor, nn

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import MismatchError, SettingError
from mpq_plugins.models.folding import conv_bn_pairs
from mpq_plugins.plans.arguments import check_plan
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.legalise import require_legal
from mpq_plugins.plans.plan import Plan

from ..shared.folded import planned_by_name, planned_layers, refuse_float16
from .checks import CAPABILITIES, check
from .conversion import activation_quantizer
from .layers import LAYERS
from .quantizers import weight_quantizer


def layer_map(plan: Plan, model: nn.Module | None = None) -> dict[type[nn.Module], tuple[type[nn.Module], Any]]:
    """Make the plan a `compute_layer_map` for Brevitas's `layerwise_quantize`; weights are the plan's to the bit.

    Brevitas skips what it does not find, changes the model in place, and goes by exact types. A plan measured with
    BatchNorm folded wants the folded model, and so `model`.

    Args:
        plan: The plan.
        model: The model, by which everything is checked beforehand that would be skipped or lost. Without it only a
            layer that the plan does not know is refused, when Brevitas comes to it.

    Returns:
        Types of layers, with what they become.

    Raises:
        MismatchError: As `to_brevitas`.
        SettingError: As `to_brevitas`.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import brevitas
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> torch.nn.Linear in brevitas.layer_map(mpq.Uniform(bits=3)(mpq.measure(net)), net)
        True
    """
    check_plan(plan)
    require_legal(plan, CAPABILITIES)
    refuse_float16(plan, "layerwise_quantize", "to_brevitas")
    if model is not None:
        check(plan, model)
        check_layerwise(plan, model)
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

    def inputs(name: str) -> type | None:
        return activation_quantizer(planned[name].activation_bits) if name in planned else None

    # Brevitas calls nothing but real lambdas of two arguments.
    common = {"weight_quant": lambda module, name: weight(module, name)}
    more = common | {"input_quant": lambda module, name: inputs(name)}
    return {cls: (twin, common if cls is nn.Embedding else more) for cls, twin in LAYERS.items()}


def check_layerwise(plan: Plan, model: nn.Module) -> None:
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
