"""How much each value of a block's output counts: its squared gradient (BRECQ, sec. 3.3, eq. 10).

The gradient is that of the float model's own log-likelihood, at labels drawn from its predictions, for which the
squares are the diagonal of the Fisher information (Kunstner et al. 2019, arXiv 1905.12558).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import SettingError
from ..models.labels import own_labels_loss
from ..models.running import call_model
from .capture import first_tensor


def importance_of(
    model: nn.Module, block: nn.Module, name: str, batch: Any, generator: torch.Generator
) -> list[Tensor]:
    """For each call of the block on a batch, its output's squared gradients, of mean 1.

    Raises SettingError where the model gives no logits or they do not depend on the block.
    """
    outputs: list[Tensor] = []

    def track(_: nn.Module, __: Any, output: Any) -> Any:
        first = first_tensor(output, name)
        # A later call may depend on an earlier one.
        tracked = first if first.requires_grad else first.detach().requires_grad_()
        # What follows may change it in place, which a leaf does not allow.
        outputs.append(tracked)
        return tree_map(lambda leaf: tracked.clone() if leaf is first else leaf, output)

    handle = block.register_forward_hook(track)
    try:
        with torch.enable_grad():
            loss = _loss(call_model(model, batch), name, generator)
            gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
    finally:
        handle.remove()
    squares = [torch.zeros_like(o) if g is None else g.square() for g, o in zip(gradients, outputs, strict=True)]
    means = [float(square.mean()) if square.numel() else 1.0 for square in squares]
    if not all(mean > 0 for mean in means):
        raise SettingError(f"block {name!r}: the predictions do not depend on it; reconstruct with loss='mse'")
    return [square / mean for square, mean in zip(squares, means, strict=True)]


def _loss(output: Any, name: str, generator: torch.Generator) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() < 2 or logits.shape[-1] < 2 or not logits.requires_grad:
        raise SettingError(
            f"block {name!r}: the model gives a {type(output).__name__} that is no logits (..., classes) or does not "
            "depend on the block, and loss='fisher' needs them; use loss='mse'"
        )
    return own_labels_loss(logits, generator)
