"""Output MSE: the squared error that a layer's quantized weights put on its output, from one pass over the inputs.

    S_c(b) = 1/N sum_np (sum_j (w_cj - w'_cj) x_npj)^2  ~  sum_j (w_cj - w'_cj)^2 h_j,    h_j = 1/N sum_np x_npj^2

over samples n and output positions p, taking errors of different weights to be independent of each other: the diagonal
of the second moments that GPTQ and its kin use in full.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batches import call_model, sample_count
from ..errors import SettingError
from .sensitivities import Curves, Job

TRANSPOSED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


@dataclass(frozen=True)
class OutputMSE:
    """sum_j (w - w')_cj^2 h_j for every output channel, in the squared unit of the layer's output, per sample."""

    name: ClassVar[str] = "output_mse"

    def measure(self, job: Job) -> Mapping[str, Curves]:
        """One forward pass a batch."""
        moments = second_moments(job)
        found = {}
        for layer in job.table.layers:
            channels = job.squared_errors(layer, moments[layer.name])
            found[layer.name] = Curves(channels.sum(1), channels)
        return found


def second_moments(job: Job) -> dict[str, Tensor]:
    """h of every layer, in its weight's shape (each output channel sees the same inputs), float32.

    Raises SettingError, naming the layer, where no batch reaches it.
    """
    sums: dict[str, Tensor] = {}
    handles = []
    for layer in job.table.layers:
        for module in job.modules[layer.name]:

            def hook(own: nn.Module, inputs: tuple[Any, ...], _: Any, name: str = layer.name) -> None:
                sums[name] = sums.get(name, 0) + _squares_seen(own, inputs[0])

            handles.append(module.register_forward_hook(hook))
    samples = 0
    try:
        for position, batch in enumerate(job.batches):
            job.said(position, len(job.batches))
            with torch.no_grad():
                job.run(batch) if job.output is not None else call_model(job.model, batch)
            samples += sample_count(batch)
    finally:
        for handle in handles:
            handle.remove()
    job.said(len(job.batches), len(job.batches))
    for layer in job.table.layers:
        if layer.name not in sums:
            raise SettingError(
                f"layer {layer.name!r}: no batch reaches it, so its inputs are not known; give inputs that do, or skip "
                "the layer"
            )
    return {name: total / samples for name, total in sums.items()}


def _squares_seen(module: nn.Module, x: Tensor) -> Tensor:
    """sum_n,p x_npj^2 for every weight: the gradient of the layer's summed output on x^2 says just that."""
    weight = torch.zeros_like(module.weight, requires_grad=True)  # type: ignore[arg-type]
    with torch.enable_grad():
        total = _output(module, x.detach() if isinstance(module, nn.Embedding) else x.detach().square(), weight).sum()
    (gradient,) = torch.autograd.grad(total, weight)
    return gradient


def _output(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return F.linear(x, weight)
    if isinstance(module, nn.Embedding):
        return F.embedding(x, weight)
    for kind, function in TRANSPOSED.items():
        if isinstance(module, kind):
            return function(
                x, weight, None, module.stride, module.padding, module.output_padding, module.groups, module.dilation
            )
    result: Tensor = module._conv_forward(x, weight, None)
    return result
