"""Calibration, bias correction, GPTQ and GPFQ: what Brevitas does with a model after its conversion.

Each is one call on a model from `to_brevitas` and gives a new one, in evaluation mode; the given one is not changed.
Batches are what the model takes: a tensor, a tuple of arguments or a dict of keywords each, a few hundred inputs in
all. They are run once for each layer, so they stay in memory. progress is called with (what, done, total).
"""

import warnings
from collections.abc import Container, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpq_plugins.common.progress import Progress
from mpq_plugins.common.text import first_few
from mpq_plugins.errors import SettingError, WeightError
from mpq_plugins.models.arguments import check_module
from mpq_plugins.models.copying import duplicate

from ..shared.input_ranges import watched
from .batches import Batch, called_layers, given_batches, ready, report, run
from .float_weights import begin_at_float, begin_at_own_bias, mark, require_float
from .graph import BiasCorrection, bias_correction_mode, float_inputs, gpfq_mode, gptq_mode
from .read import input_quantizers, is_quantized, planned_inputs, set_input_range, weight_codes

GREEDY = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what Brevitas has GPTQ and GPFQ for


def calibrate(quantized: nn.Module, batches: Iterable[Batch], *, progress: Progress | None = None) -> nn.Module:
    """Set the ranges of quantized inputs, found on the batches as the plan says of each layer.

    Weights are the plan's meanwhile, and all inputs are in floating point. Done again, it begins again.

    Args:
        quantized: What `to_brevitas` made, its activations quantized; it is changed.
        batches: Inputs without labels.
        progress: Called with what is being done, batches done and batches in all.

    Returns:
        The model.

    Raises:
        SettingError: No layer quantizes its inputs, no batch reaches a layer, or the model cannot take the batches.
    """
    check_module(quantized, "quantized")
    given = given_batches(batches)
    names = input_quantizers(quantized)
    if not names:
        raise SettingError(
            "calibrate: no layer quantizes its inputs; convert with activation_bits=8 (embeddings take indices)"
        )
    tuned = duplicate(quantized).eval()
    for name in names:
        cast(Any, tuned.get_submodule(name)).input_quant.init_tensor_quant()  # without the ranges of an earlier call
    tuned.eval()
    unreached = [repr(name) for name in names if name not in called_layers(tuned, given)]
    if unreached:
        raise SettingError(
            f"calibrate: no batch reaches {first_few(unreached, ', ')}: give batches that do, or skip them in the plan"
        )
    layers = {name: tuned.get_submodule(name) for name in names}
    with torch.no_grad(), watched(layers) as seen, float_inputs(tuned):
        for done, batch in enumerate(given, 1):
            run(tuned, batch)
            report(progress, "calibrating", done, len(given))
    for name, layer in layers.items():
        set_input_range(layer, seen[name].range(planned_inputs(layer)))
    _require_finite(tuned, "calibrate")
    return tuned


def correct_bias(quantized: nn.Module, batches: Iterable[Batch], *, progress: Progress | None = None) -> nn.Module:
    """Add to each layer's bias the mean output error that quantization causes, per channel, over all inputs.

    Layers without a bias get one. It comes last: tuning a model begins at its own biases again, and so does a second
    correction.

    Args:
        quantized: What `to_brevitas` made, tuned or not; it is changed.
        batches: Inputs without labels.
        progress: Called with what is being done, how much of it is done and how much there is.

    Returns:
        The model.

    Raises:
        SettingError: The model cannot take the batches, activations have no ranges, the model was trained or loaded so
            that its float weights are gone, or it has embeddings alone.
    """
    given = given_batches(batches)
    tuned = ready(quantized)
    reached = called_layers(tuned, given)
    require_float(tuned, "correct_bias")
    layers = {name: tuned.get_submodule(name) for name in reached if hasattr(tuned.get_submodule(name), "bias_quant")}
    if not layers:
        raise SettingError("correct_bias: the batches reach no layer that can have a bias")
    for module in layers.values():
        begin_at_own_bias(module)
    running = bias_correction_mode(tuned)
    running.bias_correction = BiasCorrection()
    with torch.no_grad(), running:
        for done, batch in enumerate(given, 1):
            run(tuned, batch)
            report(progress, "correcting biases", done, len(given))
    _require_finite(tuned, "correct_bias")
    mark(tuned)
    return tuned


def gptq(
    quantized: nn.Module, batches: Iterable[Batch], *, act_order: bool = True, progress: Progress | None = None
) -> nn.Module:
    """Run Brevitas's GPTQ (arXiv 2210.17323), layer by layer: the weights not yet rounded make up for those that are.

    Scales stay the plan's.

    Args:
        quantized: What `to_brevitas` made; it is changed.
        batches: Inputs without labels.
        act_order: Whether the weights of the strongest inputs come first.
        progress: Called with a layer's name, layers done and layers in all.

    Returns:
        The model.

    Raises:
        SettingError: As `gpfq`.
        WeightError: As `gpfq`.
    """
    return _greedy("GPTQ", gptq_mode, quantized, batches, act_order, progress)


def gpfq(
    quantized: nn.Module, batches: Iterable[Batch], *, act_order: bool = True, progress: Progress | None = None
) -> nn.Module:
    """Run Brevitas's GPFQ (greedy path following, doi 10.1137/22M1511709), layer by layer, on the float model's path.

    Scales stay the plan's. It begins at the float weights and biases, whatever was tuned before. It warns, by name, of
    layers that it leaves as they were: transposed convolutions and embeddings, which Brevitas has it not for, and
    layers that no batch reaches.

    Args:
        quantized: What `to_brevitas` made; it is changed.
        batches: Inputs without labels.
        act_order: Whether the weights of the strongest inputs come first.
        progress: Called with a layer's name, layers done and layers in all.

    Returns:
        The model.

    Raises:
        SettingError: The model cannot take the batches, activations have no ranges, the model was trained or loaded so
            that its float weights are gone, scales follow the weights (Brevitas's default, under which it does
            nothing), or no code changed.
        WeightError: A layer's inputs give nothing to work with.
    """
    return _greedy("GPFQ", gpfq_mode, quantized, batches, act_order, progress)


def _greedy(
    name: str, mode: Any, quantized: nn.Module, batches: Iterable[Batch], act_order: bool, progress: Progress | None
) -> nn.Module:
    given = given_batches(batches)
    tuned = ready(quantized)
    reached = called_layers(tuned, given)
    layers = {layer: module for layer, module in tuned.named_modules() if is_quantized(module)}
    if not any(isinstance(layers[layer], GREEDY) for layer in reached):
        raise SettingError(f"{name}: the batches reach no layer that Brevitas has it for (linear, convolutions)")
    moving = [repr(layer) for layer, module in layers.items() if _scale_moves(module)]
    if moving:
        raise SettingError(
            f"{name} would do nothing to {first_few(moving, ', ')}, whose scales follow their weights as these change: "
            "convert with to_brevitas, or with Brevitas's ScalingImplType.PARAMETER_FROM_STATS"
        )
    require_float(tuned, name)
    begin_at_float(layers)
    before = {layer: weight_codes(module).codes for layer, module in layers.items()}
    own_forward = "forward" in vars(tuned)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        with mode(tuned, act_order=act_order) as running:
            for done in range(1, running.num_layers + 1):
                for batch in given:
                    run(running.model, batch)
                current = ", ".join(running.current_layer.layer_names)
                _update(running, name, current)
                report(progress, current, done, running.num_layers)
    if not own_forward:
        vars(tuned).pop("forward", None)  # which Brevitas leaves on the instance
    _weigh(name, caught)
    _require_finite(tuned, name)
    finish(name, tuned, before, {layer for layer in reached if isinstance(layers[layer], GREEDY)}, calls=2)
    return tuned


def finish(name: str, tuned: nn.Module, before: Mapping[str, Tensor], treated: Container[str], calls: int) -> None:
    """Leave weights at their quantized values, as a file would, and name layers that were not treated.

    calls: how many are between the user's and this one. Raises SettingError where every code is as it was before.
    """
    layers = {layer: tuned.get_submodule(layer) for layer in before}
    same = [layer for layer, module in layers.items() if weight_codes(module).codes.equal(before[layer])]
    if len(same) == len(layers):
        raise SettingError(
            f"{name} changed no code: the batches say nothing that rounding to nearest has not got right"
        )
    for module in layers.values():
        weight = cast(Tensor, module.weight)
        weight.data.copy_(weight_codes(module).value.reshape(weight.shape))
    mark(tuned)
    left = [repr(layer) for layer in same if layer not in treated]
    if left:
        warnings.warn(
            f"{name} leaves {first_few(left, ', ')} as they were: reached by no batch, or of a kind that Brevitas has "
            "it not for",
            stacklevel=2 + calls,
        )


def _scale_moves(module: nn.Module) -> bool:
    """Whether a layer's scale is worked out of its weights each time."""
    quantizer, weight = cast(Any, module).weight_quant.tensor_quant, cast(Tensor, module.weight)
    with torch.no_grad():
        scale, before = quantizer(weight)[1].clone(), weight.clone()
        weight.mul_(2)
        moved = not scale.equal(quantizer(weight)[1])
        weight.copy_(before)
    return moved


def _update(running: Any, name: str, current: str) -> None:
    try:
        running.update()
    except AssertionError as error:
        raise WeightError(
            f"{name}: layer {current!r} has inputs that are NaN or infinite; look at the batches"
        ) from error


def _weigh(name: str, caught: list[warnings.WarningMessage]) -> None:
    """Raise for what Brevitas only remarks on; pass its other remarks on."""
    for remark in caught:
        if "Failed to compute the inverse" in str(remark.message):
            raise WeightError(f"{name}: {remark.message}. Are there NaN inputs, or too few?")
        if "ConvTranspose is temporarily unsupported" not in str(remark.message):  # which we tell ourselves
            warnings.warn_explicit(remark.message, remark.category, remark.filename, remark.lineno)


def _require_finite(tuned: nn.Module, name: str) -> None:
    layers = [(layer, module) for layer, module in tuned.named_modules() if is_quantized(module)]
    broken = [
        repr(layer)
        for layer, module in layers
        if not all(torch.isfinite(value).all() for value in (*module.parameters(), *module.buffers()))
    ]
    if broken:
        raise WeightError(f"{name}: {first_few(broken, ', ')} became NaN or infinite; look at the batches")
