"""What follows in a Brevitas user's life: calibration, bias correction, GPTQ, GPFQ, training.

Each is one call on a model from `to_brevitas` and gives a new one, in evaluation mode; the given one is not changed.
Batches are what the model takes: a tensor, a tuple of arguments or a dict of keywords each, a few hundred inputs in
all. They are run once for each layer, so they stay in memory. progress is called with (what, done, total).
"""

import copy
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from brevitas.utils.torch_utils import StopFwdException
from torch import Tensor, nn

from mpq_plugins.errors import MPQError, SettingError, WeightError, first_few

from .brevitas_float import begin_at_float, begin_at_own_bias, forget, mark, require_float
from .brevitas_graph import BiasCorrection, bias_correction_mode, calibration_mode, gpfq_mode, gptq_mode
from .brevitas_verify import input_quantizers, is_calibrated, is_quantized, weight_codes

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]
Progress = Callable[[str, int, int], None]
Loss = Callable[[nn.Module, Batch], Tensor]
GREEDY = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what Brevitas has GPTQ and GPFQ for


def calibrate(quantized: nn.Module, batches: Iterable[Batch], *, progress: Progress | None = None) -> nn.Module:
    """Set the ranges of quantized activations: Brevitas's percentiles (0.001 and 99.999), averaged over the batches.

    Done again, it begins again. Raises SettingError: no layer quantizes its inputs, a layer that no batch reaches,
    batches that the model cannot take.
    """
    given = given_batches(batches)
    names = input_quantizers(quantized)
    if not names:
        raise SettingError(
            "calibrate: no layer quantizes its inputs; convert with activation_bits=8 (embeddings take indices)"
        )
    tuned = copy.deepcopy(quantized).eval()
    for name in names:
        cast(Any, tuned.get_submodule(name)).input_quant.init_tensor_quant()  # without the ranges of an earlier call
    tuned.eval()
    unreached = [repr(name) for name in names if name not in called_layers(tuned, given)]
    if unreached:
        raise SettingError(
            f"calibrate: no batch reaches {first_few(unreached, ', ')}: give batches that do, or skip them in the plan"
        )
    with torch.no_grad(), calibration_mode(tuned):
        for done, batch in enumerate(given, 1):
            run(tuned, batch)
            report(progress, "calibrating", done, len(given))
    _require_finite(tuned, "calibrate")
    return tuned


def correct_bias(quantized: nn.Module, batches: Iterable[Batch], *, progress: Progress | None = None) -> nn.Module:
    """Add to each layer's bias the mean output error that quantization causes, per channel, over all inputs.

    Layers without a bias get one. It comes last: tuning a model begins at its own biases again, and so does a second
    correction. Raises SettingError: batches that the model cannot take, activations without ranges, a model that was
    trained or loaded, whose float weights are gone, or one with embeddings alone.
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
    """Brevitas's GPTQ (arXiv 2210.17323), layer by layer: the weights not yet rounded make up for those that are.

    act_order: the weights of the strongest inputs first. Scales stay the plan's. Raises as gpfq.
    """
    return _greedy("GPTQ", gptq_mode, quantized, batches, act_order, progress)


def gpfq(
    quantized: nn.Module, batches: Iterable[Batch], *, act_order: bool = True, progress: Progress | None = None
) -> nn.Module:
    """Brevitas's GPFQ (greedy path following, doi 10.1137/22M1511709), layer by layer, against the float model's path.

    act_order: the weights of the strongest inputs first. Scales stay the plan's. It begins at the float weights and
    biases, whatever was tuned before. Warns, by name, of layers that it leaves as they were: transposed convolutions
    and embeddings, which Brevitas has it not for, and layers that no batch reaches. Raises SettingError: batches that
    the model cannot take, activations without ranges, a model that was trained or loaded, whose float weights are
    gone, scales that follow the weights (Brevitas's default, under which it does nothing), no code that changed;
    WeightError: a layer whose inputs give nothing to work with.
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

    loss: (model, batch) -> a scalar, as `distillation(teacher)`; it gets each batch as it is, so labels may be in it:
    `lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])`. Batches come in their order each epoch; BatchNorm
    keeps its statistics. Widths and zero points stay the plan's. What is trainable stays so, for a loop of one's own.
    Raises SettingError: no batch, epochs below 1, an lr that is not positive, nothing to train, a loss that is no
    scalar with a gradient; WeightError: a loss that is NaN or infinite.
    """
    given = given_batches(batches)
    check_schedule("train", "epochs", epochs, lr)
    tuned = ready(quantized)
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    if not parameters:
        raise SettingError("train: every parameter is frozen; set requires_grad on what is to be trained")
    steps = epochs * len(given)
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        value = _loss(loss, tuned, given[step % len(given)])
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise SettingError("train: loss(model, batch) must be a scalar tensor with a gradient")
        if not torch.isfinite(value):
            raise WeightError(f"train: the loss is {value.item()} at step {step + 1} of {steps}; try a lower lr")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        report(progress, "training", step + 1, steps)
    optimizer.zero_grad()
    forget(tuned)
    return tuned


@torch.enable_grad()
def _loss(loss: Loss, model: nn.Module, batch: Batch) -> Tensor:
    try:
        return loss(model, batch)
    except MPQError:
        raise
    except Exception as error:  # a user's loss may raise anything
        reason = str(error).splitlines()[0] if str(error) else ""
        raise SettingError(
            f"train: loss(model, batch) fails ({type(error).__name__}: {reason}). One of your own may be "
            "lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])"
        ) from error


def distillation(teacher: nn.Module) -> Loss:
    """The loss that needs no labels: KL divergence of the model's logits, (..., classes), from the teacher's.

    teacher: the float model, of which a copy in evaluation mode is asked. Outputs may be logits, have them as
    `.logits`, or give them first of several.
    """
    fixed = copy.deepcopy(teacher).eval()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            target = _logits(run(fixed, batch))
        logits = _logits(run(model, batch))
        own, wanted = (F.log_softmax(values.reshape(-1, values.shape[-1]), -1) for values in (logits, target))
        return F.kl_div(own, wanted, reduction="batchmean", log_target=True)

    return loss


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    found = found[0] if isinstance(found, tuple | list) and found else found
    if not isinstance(found, Tensor) or found.dim() == 0:
        raise SettingError(f"distillation: the model gives a {type(output).__name__}, no logits; write your own loss")
    return found


def check_schedule(what: str, name: str, count: object, lr: object, least: int = 1) -> None:
    """Raise SettingError for a number of steps or epochs, or a rate, that cannot be."""
    if type(count) is not int or count < least or not isinstance(lr, int | float) or not lr > 0:
        raise SettingError(f"{what}: {name} {count!r}, lr {lr!r}: {name} must be {least} or more, and lr above 0")


def _greedy(
    name: str, mode: Any, quantized: nn.Module, batches: Iterable[Batch], act_order: bool, progress: Progress | None
) -> nn.Module:
    given = given_batches(batches)
    tuned = ready(quantized)
    reached = called_layers(tuned, given)
    layers = {own: module for own, module in tuned.named_modules() if is_quantized(module)}
    if not any(isinstance(layers[own], GREEDY) for own in reached):
        raise SettingError(f"{name}: the batches reach no layer that Brevitas has it for (linear, convolutions)")
    moving = [repr(own) for own, module in layers.items() if _scale_moves(module)]
    if moving:
        raise SettingError(
            f"{name} would do nothing to {first_few(moving, ', ')}, whose scales follow their weights as these change: "
            "convert with to_brevitas, or with Brevitas's ScalingImplType.PARAMETER_FROM_STATS"
        )
    require_float(tuned, name)
    begin_at_float(layers)
    before = {own: weight_codes(module).codes for own, module in layers.items()}
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
    finish(name, tuned, before, {own for own in reached if isinstance(layers[own], GREEDY)}, calls=2)
    return tuned


def finish(name: str, tuned: nn.Module, before: Mapping[str, Tensor], treated: Container[str], calls: int) -> None:
    """Leave weights at their quantized values, as a file would, and name layers that were not treated.

    calls: how many are between the user's and this one. Raises SettingError where every code is as it was before.
    """
    layers = {own: tuned.get_submodule(own) for own in before}
    same = [own for own, module in layers.items() if weight_codes(module).codes.equal(before[own])]
    if len(same) == len(layers):
        raise SettingError(
            f"{name} changed no code: the batches say nothing that rounding to nearest has not got right"
        )
    for module in layers.values():
        weight = cast(Tensor, module.weight)
        weight.data.copy_(weight_codes(module).value.reshape(weight.shape))
    mark(tuned)
    left = [repr(own) for own in same if own not in treated]
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


def _weigh(name: str, caught: list[warnings.WarningMessage]) -> None:
    """Raise for what Brevitas only remarks on; pass its other remarks on."""
    for remark in caught:
        if "Failed to compute the inverse" in str(remark.message):
            raise WeightError(f"{name}: {remark.message}. Are there NaN inputs, or too few?")
        if "ConvTranspose is temporarily unsupported" not in str(remark.message):  # which we tell ourselves
            warnings.warn_explicit(remark.message, remark.category, remark.filename, remark.lineno)


def _require_finite(tuned: nn.Module, name: str) -> None:
    state = (*tuned.named_parameters(), *tuned.named_buffers())
    broken = [repr(own) for own, value in state if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise WeightError(f"{name}: {first_few(broken, ', ')} became NaN or infinite; look at the batches")


def run(model: nn.Module, batch: Batch) -> Any:
    """Call a model on a batch. Raises SettingError, with the model's own words, where it cannot take it."""
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple) else model(batch)
    except (StopFwdException, MPQError):
        raise
    except Exception as error:  # a user's forward may raise anything
        shape = _shape(batch)
        reason = str(error).splitlines()[0] if str(error) else ""
        raise SettingError(
            f"batches: {type(model).__name__} fails on one of {shape} ({type(error).__name__}: {reason}). Give what "
            "it takes: a tensor, a tuple of arguments or a dict of keywords, without labels"
        ) from error


def _shape(batch: Batch) -> str:
    if isinstance(batch, Mapping):
        return ", ".join(f"{name}: {_shape(value)}" for name, value in batch.items())
    if isinstance(batch, tuple):
        return f"({', '.join(map(_shape, batch))})"
    return str(tuple(batch.shape)) if isinstance(batch, Tensor) else type(batch).__name__


def given_batches(batches: Iterable[Batch]) -> list[Batch]:
    """All batches. Raises SettingError for none, for one that is not in a list, and for empty ones and NaN."""
    if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
        raise SettingError(
            f"batches: is a {type(batches).__name__}; give a list of them, as [batch] or tensor.split(128)"
        )
    given: list[Batch] = [tuple(batch) if isinstance(batch, list) else batch for batch in cast(Iterable[Any], batches)]
    if not given:
        raise SettingError("batches: there are none; give at least one, of a few hundred inputs in all")
    for number, batch in enumerate(given, 1):
        parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
        for value in (part for part in parts if isinstance(part, Tensor)):
            if value.numel() == 0:
                raise SettingError(f"batches: number {number} of {len(given)} is empty, {tuple(value.shape)}")
            if value.isnan().any() or (value.is_floating_point() and len(parts) == 1 and value.isinf().any()):
                raise SettingError(f"batches: number {number} of {len(given)} has values that are NaN or infinite")
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


def called_layers(quantized: nn.Module, batches: Sequence[Batch]) -> set[str]:
    """The quantized layers that any batch reaches.

    Raises SettingError for what Brevitas's corrections read wrongly: linear layers on more than three dimensions, and
    convolutions of inputs without a batch dimension.
    """
    reached: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            reached.add(name)
            dimensions = output.dim() - cast(Tensor, module.weight).dim()
            if isinstance(module, nn.Linear) and output.dim() > 3:
                raise SettingError(
                    f"layer {name!r} works on {output.dim()} dimensions, which Brevitas would read wrongly; flatten "
                    "its input to (N, T, features), or skip it in the plan"
                )
            if not isinstance(module, nn.Embedding) and dimensions < 0:
                raise SettingError(f"layer {name!r} is given inputs without a batch dimension; give batches of them")

        return hook

    layers = [(name, module) for name, module in quantized.named_modules() if is_quantized(module)]
    hooks = [module.register_forward_hook(note(name)) for name, module in layers]
    try:
        with torch.no_grad():
            for batch in batches:
                run(quantized, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return reached


def report(progress: Progress | None, what: str, done: int, total: int) -> None:
    """Tell how far it is, where somebody listens."""
    if progress is not None:
        progress(what, done, total)
