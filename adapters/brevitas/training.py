"""Quantization-aware training of a Brevitas model, with labels or without."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq_plugins.common.progress import Progress
from mpq_plugins.common.text import what_it_said
from mpq_plugins.errors import MPQError, SettingError, WeightError
from mpq_plugins.models.arguments import check_module
from mpq_plugins.models.copying import duplicate

from .batches import Batch, check_schedule, given_batches, ready, report, run
from .float_weights import forget

Loss = Callable[[nn.Module, Batch], Tensor]


def train(
    quantized: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    *,
    epochs: int = 4,
    lr: float = 1e-4,
    progress: Progress | None = None,
) -> nn.Module:
    """Train with quantization: weights, biases, norms and scales by Adam, its rate falling to 0 along a cosine.

    Batches come in their order each epoch; BatchNorm keeps its statistics. Widths and zero points stay the plan's. What
    is trainable stays so, for a loop of one's own.

    Args:
        quantized: What `to_brevitas` made; it is changed.
        batches: What the loss gets, each as it is, so labels may be in it.
        loss: (model, batch) -> a scalar, as `distillation(teacher)`, or with labels
            `lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])`.
        epochs: How often the batches are gone through.
        lr: Adam's first rate.
        progress: Called with what is being done, steps done and steps in all.

    Returns:
        The model.

    Raises:
        SettingError: There is no batch, epochs are below 1, lr is not positive, nothing is to train, or the loss is no
            scalar with a gradient.
        WeightError: The loss is NaN or infinite.
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
        raise SettingError(
            f"train: loss(model, batch) fails ({what_it_said(error)}). One of your own may be "
            "lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])"
        ) from error


def distillation(teacher: nn.Module) -> Loss:
    """Make the loss that needs no labels: KL divergence of the model's logits from the teacher's.

    Outputs may be logits, (..., classes), have them as `.logits`, or give them first of several.

    Args:
        teacher: The float model, of which a copy in evaluation mode is asked.

    Returns:
        (model, batch) -> a scalar, for `train`.

    Examples:
        >>> import torch
        >>> from mpq_plugins.adapters import brevitas
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> float(brevitas.distillation(net)(net, torch.zeros(2, 8)).detach())
        0.0
    """
    check_module(teacher, "teacher")
    fixed = duplicate(teacher).eval()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            target = _logits(run(fixed, batch))
        logits = _logits(run(model, batch))
        reached, wanted = (F.log_softmax(values.reshape(-1, values.shape[-1]), -1) for values in (logits, target))
        return F.kl_div(reached, wanted, reduction="batchmean", log_target=True)

    return loss


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple | list) and logits else logits
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        raise SettingError(f"distillation: the model gives a {type(output).__name__}, no logits; write your own loss")
    return logits
