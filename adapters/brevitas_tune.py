"""What follows in a Brevitas user's life: calibration, bias correction, GPTQ, GPFQ, training.

Each is one call on a model from `to_brevitas` and gives a new one, in evaluation mode; the given one is not changed.
Batches are what the model takes: a tensor, a tuple of arguments or a dict of keywords each, a few hundred inputs in
all. They are run once for each layer, so they stay in memory. progress is called with (what, done, total).
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from brevitas.utils.torch_utils import StopFwdException
from torch import Tensor, nn

from mpq_plugins.errors import MPQError, SettingError, WeightError, first_few

from .brevitas_graph import bias_correction_mode, calibration_mode, gpfq_mode, gptq_mode
from .brevitas_verify import input_quantizers, is_calibrated, is_quantized, weight_codes

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]
Progress = Callable[[str, int, int], None]
Loss = Callable[[nn.Module, Batch], Tensor]
GREEDY = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what Brevitas has GPTQ and GPFQ for
WEIGHT_ORIG = "weight_orig"  # Brevitas's name for the float weights that it looks at with quantization switched off


def calibrate(quantized: nn.Module, batches: Iterable[Batch], *, progress: Progress | None = None) -> nn.Module:
    """Set the ranges of quantized activations: Brevitas's percentiles (0.001 and 99.999), averaged over the batches.

    Raises SettingError where no activations are quantized, or there is no batch that the model can take.
    """
    given = given_batches(batches)
    if not input_quantizers(quantized):
        raise SettingError("calibrate: no activations are quantized; convert with activation_bits=8")
    tuned = copy.deepcopy(quantized).eval()
    with torch.no_grad(), calibration_mode(tuned):
        for done, batch in enumerate(given, 1):
            run(tuned, batch)
            report(progress, "calibrating", done, len(given))
    return tuned


def correct_bias(quantized: nn.Module, batches: Iterable[Batch], *, progress: Progress | None = None) -> nn.Module:
    """Add to each layer's bias the mean output error that quantization causes, per channel.

    Layers without a bias get one. Raises SettingError: batches that the model cannot take, activations without
    ranges, or a model whose float weights are gone (loaded from a file, say), where there is no error to be seen.
    """
    given = given_batches(batches)
    tuned = ready(quantized)
    called_layers(tuned, given[0])
    if all(_on_grid(module) for module in tuned.modules() if is_quantized(module)):
        raise SettingError(
            "correct_bias: the float weights are gone, so there is no error to correct. Do it before saving, or "
            "convert the float model anew"
        )
    with torch.no_grad(), bias_correction_mode(tuned):
        for done, batch in enumerate(given, 1):
            run(tuned, batch)
            report(progress, "correcting biases", done, len(given))
    return tuned


def gptq(
    quantized: nn.Module, batches: Iterable[Batch], *, act_order: bool = True, progress: Progress | None = None
) -> nn.Module:
    """Brevitas's GPTQ (arXiv 2210.17323), layer by layer: the weights not yet rounded make up for those that are.

    act_order: the weights of the strongest inputs first. Scales stay the plan's. Raises as gpfq.
    """
    return _greedy("GPTQ", gptq_mode, quantized, batches, act_order, progress)


def gpfq(
    quantized: nn.Module, batches: Iterable[Batch], *, act_order: bool = True, progress: Progress | None = None
) -> nn.Module:
    """Brevitas's GPFQ (greedy path following, doi 10.1137/22M1511709), layer by layer, against the float model's path.

    act_order: the weights of the strongest inputs first. Scales stay the plan's. Warns, by name, of layers that it
    leaves as they were: transposed convolutions and embeddings, which Brevitas has it not for, and layers that no
    batch reaches. Raises SettingError: batches that the model cannot take, activations without ranges, scales that
    follow the weights (Brevitas's default, under which it does nothing), no code that changed; WeightError: a layer
    whose inputs give nothing to work with, as where they are NaN.
    """
    return _greedy("GPFQ", gpfq_mode, quantized, batches, act_order, progress)


def train(
    quantized: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    *,
    epochs: int = 4,
    lr: float = 1e-4,
    progress: Progress | None = None,
) -> nn.Module:
    """Quantization-aware training: weights, biases, norms and scales by Adam, its rate falling to 0 along a cosine.

    loss: (model, batch) -> a scalar, as `distillation(teacher)`. Batches come in their order each epoch; BatchNorm
    keeps its statistics. Widths and zero points stay the plan's. All parameters are trainable afterwards, for a loop
    of one's own. Raises SettingError: no batch, epochs below 1, an lr that is not positive; WeightError: a loss that
    is NaN or infinite.
    """
    given = given_batches(batches)
    if epochs < 1 or not lr > 0:
        raise SettingError(f"train: epochs {epochs!r}, lr {lr!r}: epochs must be 1 or more, and lr above 0")
    tuned = ready(quantized)
    for module in tuned.modules():
        module._buffers.pop(WEIGHT_ORIG, None)  # not what these weights come from any more
    steps = epochs * len(given)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        value = loss(tuned, given[step % len(given)])
        if not torch.isfinite(value):
            raise WeightError(f"train: the loss is {value.item()} at step {step + 1} of {steps}; try a lower lr")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        report(progress, "training", step + 1, steps)
    optimizer.zero_grad()
    return tuned


def distillation(teacher: nn.Module) -> Loss:
    """The loss that needs no labels: KL divergence of the model's logits, (..., classes), from the teacher's."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            target = run(teacher, batch)
        logits = run(model, batch)
        own, wanted = (F.log_softmax(values.flatten(0, -2), -1) for values in (logits, target))
        return F.kl_div(own, wanted, reduction="batchmean", log_target=True)

    return loss


def _greedy(
    name: str, mode: Any, quantized: nn.Module, batches: Iterable[Batch], act_order: bool, progress: Progress | None
) -> nn.Module:
    given = given_batches(batches)
    tuned = ready(quantized)
    reached = called_layers(tuned, given[0])
    layers = {own: module for own, module in tuned.named_modules() if is_quantized(module)}
    moving = [repr(own) for own, module in layers.items() if _scale_moves(module)]
    if moving:
        raise SettingError(
            f"{name} would do nothing to {first_few(moving, ', ')}, whose scales follow their weights as these change: "
            "convert with to_brevitas, or with Brevitas's ScalingImplType.PARAMETER_FROM_STATS"
        )
    begin_at_float(layers)
    before = {own: weight_codes(module).codes for own, module in layers.items()}
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        with mode(tuned, act_order=act_order) as running:
            for done in range(1, running.num_layers + 1):
                for batch in given:
                    run(running.model, batch)
                current = ", ".join(running.current_layer.layer_names)
                _update(running, name, current)
                report(progress, current, done, running.num_layers)
    vars(tuned).pop("forward", None)  # which Brevitas leaves on the instance
    _weigh(name, caught, layers, before)
    left = [repr(own) for own, module in layers.items() if not isinstance(module, GREEDY) or own not in reached]
    if left:
        warnings.warn(
            f"{name} leaves {first_few(left, ', ')} as they were: transposed, embeddings, or reached by no batch",
            stacklevel=3,
        )
    return tuned


def begin_at_float(layers: Mapping[str, nn.Module]) -> None:
    """Begin at the float weights, where an earlier call has kept them, and keep them for the next.

    They lie beside the weights, out of the state dict, under the name that Brevitas looks for.
    """
    for module in layers.values():
        weight = cast(Tensor, module.weight)
        if WEIGHT_ORIG in module._buffers:
            weight.data.copy_(cast(Tensor, module._buffers[WEIGHT_ORIG]))
        else:
            module.register_buffer(WEIGHT_ORIG, weight.detach().clone(), persistent=False)


def _scale_moves(module: nn.Module) -> bool:
    """Whether a layer's scale is worked out of its weights each time."""
    quantizer, weight = cast(Any, module).weight_quant.tensor_quant, cast(Tensor, module.weight)
    with torch.no_grad():
        scale, own = quantizer(weight)[1].clone(), weight.clone()
        weight.mul_(2)
        moved = not scale.equal(quantizer(weight)[1])
        weight.copy_(own)
    return moved


def _update(running: Any, name: str, current: str) -> None:
    try:
        running.update()
    except AssertionError as error:
        raise WeightError(
            f"{name}: layer {current!r} has inputs that are NaN or infinite; look at the batches"
        ) from error


def _weigh(
    name: str, caught: list[warnings.WarningMessage], layers: Mapping[str, nn.Module], before: Mapping[str, Tensor]
) -> None:
    """Raise for what Brevitas only remarks on, or not at all; pass its other remarks on."""
    for remark in caught:
        if "Failed to compute the inverse" in str(remark.message):
            raise WeightError(f"{name}: {remark.message}. Are there NaN inputs, or too few?")
        if "ConvTranspose is temporarily unsupported" not in str(remark.message):
            warnings.warn_explicit(remark.message, remark.category, remark.filename, remark.lineno)
    broken = [repr(own) for own, module in layers.items() if not torch.isfinite(cast(Tensor, module.weight)).all()]
    if broken:
        raise WeightError(f"{name}: {first_few(broken, ', ')} became NaN or infinite; look at the batches")
    if all(weight_codes(module).codes.equal(before[own]) for own, module in layers.items()):
        raise SettingError(
            f"{name} changed no code: the weights lie on their grid already (a loaded model, say), or the batches say "
            "nothing. Convert the float model anew, and give it real inputs"
        )


def run(model: nn.Module, batch: Batch) -> Any:
    """Call a model on a batch. Raises SettingError, with the model's own words, where it cannot take it."""
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple) else model(batch)
    except (StopFwdException, MPQError):
        raise
    except Exception as error:  # a user's forward may raise anything
        shape = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        reason = str(error).splitlines()[0] if str(error) else ""
        raise SettingError(
            f"batches: {type(model).__name__} fails on one of {shape} ({type(error).__name__}: {reason})"
        ) from error


def given_batches(batches: Iterable[Batch]) -> list[Batch]:
    """All batches. Raises SettingError for none, and for one batch that is not in a list."""
    if isinstance(batches, Tensor | Mapping):
        raise SettingError(
            f"batches: is a {type(batches).__name__}; give a list of them, as [batch] or tensor.split(128)"
        )
    given = list(batches)
    if not given:
        raise SettingError("batches: there are none; give at least one, of a few hundred inputs in all")
    return given


def ready(quantized: nn.Module) -> nn.Module:
    """A copy to work on. Raises SettingError where nothing is quantized, or activations have no ranges yet."""
    if not any(is_quantized(module) for module in quantized.modules()):
        raise SettingError(f"{type(quantized).__name__}: no layer is quantized; convert it with to_brevitas first")
    modules = dict(quantized.named_modules())
    bare = [repr(name) for name in input_quantizers(quantized) if not is_calibrated(modules[name])]
    if bare:
        raise SettingError(f"{first_few(bare, ', ')}: inputs are quantized and have no range yet; call calibrate first")
    return copy.deepcopy(quantized).eval()


def called_layers(quantized: nn.Module, batch: Batch) -> set[str]:
    """The quantized layers that a batch reaches.

    Raises SettingError for linear layers on more than three dimensions, which Brevitas's corrections read wrongly.
    """
    reached: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            reached.add(name)
            if isinstance(module, nn.Linear) and output.dim() > 3:
                raise SettingError(
                    f"layer {name!r} works on {output.dim()} dimensions, which Brevitas would read wrongly; flatten "
                    "its input to (N, T, features), or skip it in the plan"
                )

        return hook

    layers = [(name, module) for name, module in quantized.named_modules() if is_quantized(module)]
    hooks = [module.register_forward_hook(note(name)) for name, module in layers]
    try:
        with torch.no_grad():
            run(quantized, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return reached


def report(progress: Progress | None, what: str, done: int, total: int) -> None:
    """Tell how far it is, where somebody listens."""
    if progress is not None:
        progress(what, done, total)


def _on_grid(module: nn.Module) -> bool:
    """Whether a layer's float weights are no others than its quantized ones."""
    weight = cast(Tensor, module._buffers.get(WEIGHT_ORIG, module.weight))
    return weight_codes(module).value.reshape(weight.shape).equal(weight)
