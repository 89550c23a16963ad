"""Reconstruction: integer codes learned block by block, so that a quantized model computes what the float one did."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # importing the package must not import torch
    import torch
    from torch import nn

    from ..plans.plan import Plan

Progress = Callable[[str, int, int], None]
"""Called with a block's name, the steps done so far and the steps in all."""

MEMORY = 2 << 30
"""Bytes of cached inputs and outputs that are kept in memory."""


@dataclass(frozen=True)
class BlockReport:
    """What became of one block.

    nearest, learned: mean loss a sample over all calibration inputs, rounded to nearest and as it stays; changed: codes
    that are not the nearest, of `weights`; seconds: of this block, capturing included; resumed: read back from a
    checkpoint.
    """

    name: str
    layers: tuple[str, ...]
    nearest: float
    learned: float
    changed: int
    weights: int
    seconds: float
    resumed: bool = False


def reconstruct(
    model: "nn.Module",
    plan: "Plan",
    batches: Iterable[Any],
    *,
    blocks: str | Sequence[str] = (),
    steps: int = 20_000,
    batch_size: int = 32,
    lr: float | None = None,
    loss: Literal["mse", "fisher"] = "mse",
    regulariser: float = 0.01,
    mix: float = 0.5,
    correct: bool = False,
    tune: Literal["rounding", "norms"] = "rounding",
    seed: int = 0,
    device: "str | torch.device | None" = None,
    memory: int = MEMORY,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    finished: Callable[[BlockReport], None] | None = None,
) -> "nn.Module":
    """A float copy of the model whose weights lie on the plan's grids, each rounded up or down as its block needs.

    BRECQ (arXiv 2102.05426, sec. 3) with AdaRound's parametrization (arXiv 2004.10568, eq. 21 to 24), under any affine
    plan, parts included. One block after another, and each layer in no block by itself, learns whether its weights
    round up or down, so that on the inputs that the quantized model so far gives it its output is the float model's.
    Quantizing the copy by the plan changes nothing: `apply` and every adapter find the learned codes in it.

    batches: inputs without labels, as for `correct`; 1,024 samples are usual. blocks: globs, or `re:` and a regular
    expression, on module names, of which the outermost that match are the blocks; by default the innermost modules in
    a list (Sequential, ModuleList) that hold several layers, such as residual blocks and transformer layers. steps: for
    each block, each on `batch_size` samples; lr: Adam's, by default 6 / steps within 0.001 and 0.02, for a weight must
    be able to cross from one level to the next. loss: `mse`, or `fisher`, where each output counts by its
    squared gradient of the model's own predictions (logits are needed). regulariser: weight of the term that decides
    each weight. mix: probability that an input value is the float model's instead (QDrop, arXiv 2203.05740, sec. 4); 0
    is BRECQ's own. correct: begin at `correct`'s model. tune: `norms` learns the block's biases, norms and other float
    parameters along. Where the plan quantizes activations, each layer's input gets a range that is learned along and
    stays in the result (`input_ranges`). seed: the same gives the same model, whatever was interrupted. device: where
    blocks are learned, by default where the model is. memory: bytes of cached inputs and outputs; more go to disk.
    checkpoint: a folder for finished blocks; the same call goes on there, and the folder stays. progress: called with
    (block, steps done, steps in all); finished: with each block's BlockReport.

    A block that learning makes no better than rounding to nearest keeps that. Embeddings are rounded to nearest, and so
    are weights shared with one. The model itself is unchanged.

    Raises SettingError (arguments, a model in training mode, inputs it does not run on, a block that no batch reaches
    or whose inputs cannot be captured, a loss that is NaN, naming the block; a checkpoint of another job),
    MismatchError (a plan for another model), WeightError and SourceError (a disk that is full); finished blocks stay
    in the checkpoint.
    """
    from .brecq import run
    from .settings import Settings, usual_lr

    named = tuple(blocks) if isinstance(blocks, list | tuple) else (blocks,)
    settings = Settings(
        blocks=named, steps=steps, batch_size=batch_size, lr=usual_lr(steps) if lr is None else lr,
        loss=loss, regulariser=regulariser, mix=mix, correct=correct, tune=tune, seed=seed,
    )  # fmt: skip
    return run(model, plan, batches, settings, device, memory, checkpoint, progress, finished)
