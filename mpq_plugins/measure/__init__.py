"""Measuring: weights in, a LayerTable out; a model and inputs, sensitivities beside the errors."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # importing the package must not import torch
    from concurrent.futures import Executor

    import torch
    from torch import Tensor, nn

    from ..plans.scheme import Scheme
    from ..plans.table import LayerTable
    from .sensitivities import Sensitivity

Progress = Callable[[str, int, int], None]
"""Called with a layer's name, the weights measured so far and the weights in all."""


def measure(
    source: "nn.Module | str | Path",
    scheme: "Scheme | None" = None,
    bits: Sequence[int] = range(2, 9),
    metrics: Sequence[str] = ("relative", "mse"),
    *,
    per_channel: bool = False,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    fold_bn: bool | Literal["auto"] = "auto",
    weights: str | None = None,
    model: "nn.Module | None" = None,
    already_quantized: bool = False,
    example_input: Any = None,
    executor: "Executor | None" = None,
    journal: str | Path | None = None,
    device: "torch.device | str | None" = None,
    progress: Progress | None = None,
) -> "LayerTable":
    """The quantization error of every layer at every bit-width, and its importance, as plain numbers.

    source: a module, a `.safetensors` file, a directory of shards or a torch checkpoint; from files one chunk
    of a tensor is in memory at a time. scheme: Affine() (asymmetric, per tensor, min-max) by default.
    bits: any of 1..8. metrics: `relative` mean |w - w'| / |w| (zero weights count 0), `mse`, `rmse`, `sqnr_db`,
    `max_abs`. per_channel: the errors of each output channel too. skip, only: globs on layer names.
    fold_bn: whether conv weights are measured with their BatchNorm folded in; "auto" folds a module's for
    per_tensor, where folding changes the codes, and not otherwise. weights, model, already_quantized: which weights of
    a checkpoint are meant, and what is known of it, as in find_weights. example_input: a module's input (a tensor,
    or a tuple of arguments), to count multiply-accumulates.

    executor: a concurrent.futures.Executor that measures units of at most 64 MiB (one output channel at least, and
    a layer with one scale up to 256 MiB): threads, processes, or dask's `client.get_executor()`, whose machines need
    the files under the same paths, and the same processors and packages; a module's weights travel to them. As many
    threads as torch uses by default. The table is the same to the last bit whoever measures. Each worker needs 20 MiB,
    beside libraries and the table itself, whatever the model. journal: a file where finished units are kept, so that
    an interrupted measurement goes on; it stays, to be removed once the table is saved. Another job's is written anew,
    with a MeasureWarning. device: where torch computes, as "cuda"; the weights' own by default, files' on the CPU.

    Raises SettingError, SourceError or WeightError, each naming the argument, file or layer, and WorkerError where an
    executor's workers fail.
    """
    from ..plans.scheme import Affine
    from .run import run

    return run(
        source, scheme or Affine(), bits, metrics, per_channel=per_channel, skip=skip, only=only,
        fold_bn=fold_bn, weights=weights, model=model, already_quantized=already_quantized,
        example_input=example_input, executor=executor, journal=journal, device=device, progress=progress,
    )  # fmt: skip


def sensitivity(
    model: "nn.Module",
    table: "LayerTable",
    kind: "str | Sensitivity",
    batches: Iterable[Any],
    *,
    output: "Callable[[nn.Module, Any], Tensor] | None" = None,
    seed: int = 0,
    fit_ranges: bool = False,
    journal: str | Path | None = None,
    progress: Progress | None = None,
) -> "LayerTable":
    """The table with one more sensitivity: what quantizing each layer is predicted to cost, at all of its bit-widths.

    kind: `output_mse`, the squared error of the layer's output (one pass); `kl`, the divergence of the model's
    predictions, and `distance`, 1 - cosine of its output, with that layer alone quantized; `fisher` and `hessian`,
    quadratics around the float weights; another that an entry point names; or a value of such a class, as
    Hessian(probes=16). batches: a few hundred inputs without labels, as for `correct`. output: (model, batch) -> tensor
    (samples, features), for models whose own output is no logits. seed: of labels and probes; the same seed gives the
    same table. fit_ranges: quantize by the ranges of least input-weighted squared error, as the same argument of
    `correct` puts them into the model (for tables measured under affine per_channel minmax). journal: a file where
    finished layers are kept (kl and distance), so that an interrupted measurement goes on; it is removed at the end.
    The model is not changed.

    Raises SettingError (inputs, outputs, layers that no input reaches), MismatchError (another model's table) and
    PluginError (a kind that is not installed).
    """
    from .sensitivities import run

    return run(
        model, table, kind, batches, output=output, seed=seed, fit_ranges=fit_ranges, journal=journal,
        progress=progress,
    )  # fmt: skip
