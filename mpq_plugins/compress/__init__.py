"""Deep Compression (arXiv 1510.00149): prune, share or quantize by a plan, entropy code; one file that is that small.

torch is imported when a function runs, not with the package.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CompressWarning

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..plans.plan import Plan
    from .container import Container
    from .prune import Pruning
    from .streams import Choice

Progress = Callable[[str, int, int], None]
"""Called with a layer's name, weights done and weights in all."""


def compress(
    source: "nn.Module | str | Path",
    plan: "Plan",
    path: str | Path,
    *,
    prune: "Pruning | None" = None,
    coding: "Choice" = "smallest",
    progress: Progress | None = None,
    model: "nn.Module | None" = None,
    weights: str | None = None,
) -> "Container":
    """Write a model to one file as the plan has it: codes, scales and centroids, all other tensors, and the plan.

    source: a module, or a checkpoint; a plan measured with BatchNorm folded in folds a module's. prune: which weights
    of the quantized layers become 0 first. coding: `smallest` packs or entropy codes every tensor, whichever is
    smaller; `packed` packs all, so that sizes are the plan's. What comes back by `decompress` is, to the bit, what
    `apply` makes of the (pruned) weights. What the source holds beside tensors is left out, with a CompressWarning, and
    named in the container's `header.left_out`. model: of a checkpoint, the module it is of, which says what of it are
    layers where the plan does not; weights: of a torch checkpoint with several sets of weights, the key of those that
    are meant, where they are not those the plan was made from.

    Returns the container, opened. Raises MismatchError (a plan for another model), SettingError (pruning everything, or
    weights whose scheme has no 0), WeightError (NaN), SourceError (unreadable, unwritable); nothing is left half
    written.
    """
    from .write import write

    container = write(
        source, plan, Path(path), prune=prune, coding=coding, progress=progress, model=model, weights=weights
    )
    if container.header.left_out:
        text = f"left out, no tensors of the model: {', '.join(container.header.left_out)}"
        warnings.warn(CompressWarning(text), stacklevel=2)
    return container


def decompress(path: "str | Path | Container", *, progress: Progress | None = None) -> "dict[str, Tensor]":
    """All tensors of a container by name, dequantized: a state dict. Tied ones are the same tensor.

    Names are the source's; of a checkpoint, without the `module.` that DataParallel puts before them. Raises
    FormatError for a file that is no container, damaged, or newer than this version.
    """
    from .container import Container

    container = path if isinstance(path, Container) else Container.open(path)
    return container.tensors(progress)
