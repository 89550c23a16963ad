"""A model's log-likelihood at labels drawn from its own predictions: squares of its gradient are Fisher information.

At the labels of a data set they are not (Kunstner et al. 2019, arXiv 1905.12558).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SettingError


def own_labels_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The sum of the cross-entropy over all positions of logits (..., classes), in nats; a scalar with a gradient.

    generator: the labels are drawn by it, on the CPU. Raises SettingError for logits that are NaN or infinite.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    likely = flat.detach().double().softmax(1)
    if not bool(likely.isfinite().all()):
        raise SettingError("output: logits are NaN or infinite on a batch; look at the inputs and the model")
    labels = torch.multinomial(likely.cpu(), 1, generator=generator).squeeze(1)
    return F.cross_entropy(flat, labels.to(flat.device), reduction="sum")
