"""What a sensitivity is: what it is given, and what it gives for every layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..common.progress import Progress
from ..common.public import public
from ..common.store import Finished
from ..errors import SettingError
from ..models.running import call_model, own_copy
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from ..quantization.fitted import check_fits, fitted
from ..quantization.quantize import fake_quantize

Array = NDArray[np.float64]
Output = Callable[[nn.Module, Any], Tensor]
"""A user's output function: (model, batch) -> (samples, features), such as embeddings."""


@public
@dataclass(frozen=True)
class Curves:
    """A layer's predicted cost at each bit-width of the table, (bits,), and that of its channels, (bits, channels)."""

    layer: Array
    channels: Array | None = None


@public
@dataclass(frozen=True)
class Job:
    """What a sensitivity works on: a copy of the model in evaluation mode, in which it may change weights.

    weights: by layer name; modules: all that use a layer's weight; output: the user's function, or the model's own
    output; moments: second moments of the layers' inputs, where ranges are fitted to them, which `ranges` keeps;
    finished: rows of an interrupted run, for sensitivities that take long; generator: the job's own, on the CPU, for
    whatever is drawn at random.
    """

    model: nn.Module
    table: LayerTable
    batches: Sequence[Any]
    weights: Mapping[str, Tensor]
    modules: Mapping[str, Sequence[nn.Module]]
    output: Output | None
    moments: Mapping[str, Tensor] | None
    finished: Finished | None
    progress: Progress | None
    generator: torch.Generator
    ranges: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def quantized(self, layer: LayerStats) -> Iterator[Tensor]:
        """The layer's weight at each bit-width of the table, in its own shape."""
        scheme, axis = self.table.scheme, layer.channel_axis
        for b in self.table.bits:
            weight = self.weights[layer.name]
            if self.moments is not None:
                weight = self._fitted(layer, b, weight)
            yield fake_quantize(weight, b, scheme, channel_axis=axis, layer=layer.name)

    def _fitted(self, layer: LayerStats, bits: int, weight: Tensor) -> Tensor:
        """The weight clipped to its fitted ranges, which are searched once: every batch asks for them again."""
        assert self.moments is not None
        axis, key = layer.channel_axis, (layer.name, bits)
        if key not in self.ranges:
            scheme = check_fits(self.table.scheme, layer.name)
            clipped = fitted(weight, bits, scheme, self.moments[layer.name], axis)
            others = [other for other in range(clipped.dim()) if other != axis]
            if bits == 1 or not clipped.numel():
                return clipped
            self.ranges[key] = clipped.amin(others, keepdim=True), clipped.amax(others, keepdim=True)
        low, high = self.ranges[key]
        return torch.minimum(torch.maximum(weight, low), high)

    def squared_errors(self, layer: LayerStats, weight: Tensor) -> Array:
        """sum_j weight_cj (w - w')_cj^2 at each bit-width, (bits, channels); `weight` has the layer's shape."""
        exact = self.weights[layer.name]
        errors = [(w - exact).double().square() * weight.double() for w in self.quantized(layer)]
        axis = layer.channel_axis
        summed = [error.movedim(axis, 0).flatten(1).sum(1) for error in errors]
        return torch.stack(summed).cpu().numpy()

    def run(self, batch: Any) -> Tensor:
        """The output for a batch, with its graph of gradients: the user's function's, or the model's own logits.

        Raises SettingError.
        """
        output = call_model(self.model, batch) if self.output is None else self._custom(batch)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.dim() < 2:
            raise SettingError(
                f"output: {type(self.model).__name__} gives a {type(logits).__name__}, and a tensor (samples, features)"
                " is needed; pass output=, a function of the model and a batch that returns one"
            )
        return logits

    def logits(self, batch: Any) -> Tensor:
        """As `run`, for what takes the last dimension for classes. Raises SettingError."""
        output = self.run(batch)
        if output.dim() > 3:
            raise SettingError(
                f"output: has the shape {list(output.shape)}, where the last dimension should be the classes; pass "
                "output=, as in lambda model, batch: model(batch).movedim(1, -1)"
            )
        return output

    def _custom(self, batch: Any) -> Tensor:
        assert self.output is not None
        try:
            return self.output(self.model, own_copy(batch))
        except SettingError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise SettingError(f"output: the function failed ({type(error).__name__}: {error})") from error

    def said(self, done: int, total: int) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress("", done, total)


def unreached(layer: str) -> SettingError:
    """The error for a layer whose sensitivity the inputs cannot tell."""
    return SettingError(
        f"layer {layer!r}: no batch reaches it, or the output does not depend on it; give inputs that do, or skip it"
    )


@public
class Sensitivity(Protocol):
    """What predicts the cost of quantizing each layer from inputs: a frozen dataclass that an entry point names.

    The entry point is of the group `mpq_plugins.sensitivities`, and its name is what `measure --sensitivity` takes; the
    class is made without arguments there, so that every field has a default. `name` is how tables call what it
    measures. It is given a Job, and gives the Curves of every layer of the job's table.
    """

    name: ClassVar[str]

    def measure(self, job: Job) -> Mapping[str, Curves]:
        """Curves by layer name, for every layer of the job's table. Raises SettingError naming a layer it cannot."""
        ...
