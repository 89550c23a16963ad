"""The batches that tuning runs: what they may be, what a model makes of them, and which layers they reach."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from brevitas.utils.torch_utils import StopFwdException
from torch import Tensor, nn

from mpq_plugins.common.checks import shown
from mpq_plugins.common.progress import Progress
from mpq_plugins.common.text import first_few
from mpq_plugins.errors import MPQError, SettingError
from mpq_plugins.models.arguments import check_module
from mpq_plugins.models.copying import duplicate
from mpq_plugins.models.running import call_model, checked_batches

from .read import input_quantizers, is_calibrated, is_quantized

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]


def run(model: nn.Module, batch: Batch) -> Any:
    """Call a model on a batch, which a tuner of Brevitas's may end. Raises SettingError where it cannot take it."""
    return call_model(model, batch, (StopFwdException, MPQError))


def given_batches(batches: Iterable[Batch]) -> list[Batch]:
    """All batches. Raises SettingError for none, for what is no series of them, and for empty ones and NaN."""
    given: list[Batch] = [tuple(batch) if isinstance(batch, list) else batch for batch in checked_batches(batches)]
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
    check_module(quantized, "quantized")
    if not any(is_quantized(module) for module in quantized.modules()):
        raise SettingError(f"{type(quantized).__name__}: no layer is quantized; convert it with to_brevitas first")
    modules = dict(quantized.named_modules())
    bare = [repr(name) for name in input_quantizers(quantized) if not is_calibrated(modules[name])]
    if bare:
        raise SettingError(f"{first_few(bare, ', ')}: inputs are quantized and have no range yet; call calibrate first")
    return duplicate(quantized).eval()


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


def check_schedule(what: str, name: str, count: object, lr: object) -> None:
    """Raise SettingError for a number of steps or epochs, or a rate, that cannot be."""
    if type(count) is not int or count < 1 or not isinstance(lr, int | float) or not lr > 0:
        raise SettingError(f"{what}: {name} {shown(count)}, lr {shown(lr)}: {name} must be 1 or more, and lr above 0")
