"""Measuring: weights in, a LayerTable out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..scheme import Affine, Scheme

if TYPE_CHECKING:  # importing the package must not import torch
    from torch import nn

    from ..table import LayerTable

Progress = Callable[[str, int, int], None]
"""Called with a layer's name, the weights measured so far and the weights in all."""


def measure(
    source: "nn.Module | str | Path",
    scheme: Scheme | None = None,
    bits: Sequence[int] = range(2, 9),
    metrics: Sequence[str] = ("relative", "mse"),
    *,
    per_channel: bool = False,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    fold_bn: bool | Literal["auto"] = "auto",
    example_input: Any = None,
    progress: Progress | None = None,
) -> "LayerTable":
    """The quantization error of every layer at every bit-width, and its importance, as plain numbers.

    source: a module, a `.safetensors` file, a directory of shards or a torch checkpoint; from files one chunk
    of a tensor is in memory at a time. scheme: Affine() (asymmetric, per tensor, min-max) by default.
    bits: any of 1..8. metrics: `relative` mean |w - w'| / |w| (zero weights count 0), `mse`, `rmse`, `sqnr_db`,
    `max_abs`. per_channel: the errors of each output channel too. skip, only: globs on layer names.
    fold_bn: whether conv weights are measured with their BatchNorm folded in; "auto" folds a module's for
    per_tensor, where folding changes the codes, and not otherwise. example_input: a module's input (a tensor,
    or a tuple of arguments), to count multiply-accumulates.

    Raises SettingError, SourceError or WeightError, each naming the argument, file or layer.
    """
    from .run import run

    return run(
        source, scheme or Affine(), bits, metrics, per_channel=per_channel, skip=skip, only=only,
        fold_bn=fold_bn, example_input=example_input, progress=progress,
    )  # fmt: skip
