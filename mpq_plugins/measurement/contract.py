"""What a sensitivity is: what it is given, and what it gives for every layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
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
from ..models.autocast import forget_casts
from ..models.running import call_model, own_copy
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from ..quantization.fitted import check_fits, fitted
from ..quantization.quantize import fake_quantize
from .weighted import squared_errors

Array = NDArray[np.float64]
Output = Callable[[nn.Module, Any], Tensor]
"""A user's output function: (model, batch) -> (samples, features), such as embeddings."""


@public
@dataclass(frozen=True)
class Curves:
    """A layer's predicted cost at each bit-width of the table, and that of its channels.

    Attributes:
        layer: The layer's, (bits,).
        channels: Its output channels', (bits, channels); None where they cannot be told apart.
    """

    layer: Array
    channels: Array | None = None


@public
@dataclass(frozen=True)
class Job:
    """What a sensitivity works on: a copy of the model in evaluation mode, in which it may change weights.

    Attributes:
        model: The copy.
        table: The measured layers.
        batches: The inputs.
        weights: The weights by layer name.
        modules: By layer name, all modules that use its weight.
        output: The user's function, or None for the model's own output.
        moments: Second moments of the layers' inputs, where ranges are fitted to them.
        finished: Rows of an interrupted run, for sensitivities that take long.
        progress: Called with what is being done, how much of it is done and how much there is.
        generator: The job's own, on the CPU, for whatever is drawn at random.
        ranges: The ranges that were fitted, by layer and bits.
        shared: What a sensitivity keeps for the other types of a table of types, by a key of its own.
        executor: Whose workers may do what needs nothing else of the job; None for none. Results are to be the same.
        seed: Of what is drawn at random, the generator's too.
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
    shared: dict[Any, Any] = field(default_factory=dict)
    executor: Executor | None = None
    seed: int = 0

    def quantized(self, layer: LayerStats) -> Iterator[Tensor]:
        """Quantize the layer's weight to each bit-width of the table.

        Args:
            layer: The layer.

        Yields:
            The weight at each width, in its own shape.
        """
        scheme, axis = self.table.scheme_of(layer), layer.channel_axis
        for b, weight in zip(self.table.bits, self.clipped(layer), strict=True):
            yield fake_quantize(weight, b, scheme, channel_axis=axis, layer=layer.name)

    def clipped(self, layer: LayerStats) -> Iterator[Tensor]:
        """Clip the layer's weight to the range that it is quantized by, at each bit-width of the table.

        Args:
            layer: The layer.

        Yields:
            The weight for each width; as it is, where no ranges are fitted.
        """
        for b in self.table.bits:
            weight = self.weights[layer.name]
            yield weight if self.moments is None else self._fitted(layer, b, weight)

    def _fitted(self, layer: LayerStats, bits: int, weight: Tensor) -> Tensor:
        """The weight clipped to its fitted ranges, which are searched once: every batch asks for them again."""
        assert self.moments is not None
        axis, key = layer.channel_axis, (layer.name, bits)
        if key not in self.ranges:
            scheme = check_fits(self.table.scheme_of(layer), layer.name)
            clipped = fitted(weight, bits, scheme, self.moments[layer.name], axis)
            others = [other for other in range(clipped.dim()) if other != axis]
            if bits == 1 or not clipped.numel():
                return clipped
            self.ranges[key] = clipped.amin(others, keepdim=True), clipped.amax(others, keepdim=True)
        low, high = self.ranges[key]
        return torch.minimum(torch.maximum(weight, low), high)

    def squared_errors(self, layer: LayerStats, weight: Tensor) -> Array:
        """Sum weight_cj (w - w')_cj^2 over j at each bit-width.

        Args:
            layer: The layer.
            weight: What each error counts, of the layer's shape.

        Returns:
            The sums, (bits, channels).
        """
        return squared_errors(self.weights[layer.name], self.quantized(layer), weight, layer.channel_axis)

    def run(self, batch: Any) -> Tensor:
        """Give the output for a batch, with its graph of gradients: the user's function's, or the model's own logits.

        Args:
            batch: The inputs.

        Returns:
            The output.

        Raises:
            SettingError: The model does not run on the batch, or its output is no tensor (samples, features).
        """
        return model_output(self.model, batch, self.output)

    def logits(self, batch: Any) -> Tensor:
        """Give the output as `run` does, for what takes the last dimension for classes.

        Args:
            batch: The inputs.

        Returns:
            The logits, (..., classes).

        Raises:
            SettingError: As `run`; or there are no classes in the output.
        """
        return model_logits(self.model, batch, self.output)

    def said(self, done: int, total: int) -> None:
        """Report progress.

        Args:
            done: How much is done.
            total: How much there is.
        """
        if self.progress is not None:
            self.progress("", done, total)


def model_output(model: nn.Module, batch: Any, function: Output | None) -> Tensor:
    """What Job.run promises, of any model."""
    output = call_model(model, batch) if function is None else _custom(model, batch, function)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise SettingError(
            f"output: {type(model).__name__} gives a {type(logits).__name__}, and a tensor (samples, features) is "
            "needed; pass output=, a function of the model and a batch that returns one"
        )
    return logits


def model_logits(model: nn.Module, batch: Any, function: Output | None) -> Tensor:
    """What Job.logits promises, of any model."""
    output = model_output(model, batch, function)
    if output.dim() > 3:
        raise SettingError(
            f"output: has the shape {list(output.shape)}, where the last dimension should be the classes; pass "
            "output=, as in lambda model, batch: model(batch).movedim(1, -1)"
        )
    return output


def _custom(model: nn.Module, batch: Any, function: Output) -> Tensor:
    forget_casts()
    try:
        return function(model, own_copy(batch))
    except SettingError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise SettingError(f"output: the function failed ({type(error).__name__}: {error})") from error


def unreached(layer: str) -> SettingError:
    """The error for a layer whose sensitivity the inputs cannot tell."""
    return SettingError(
        f"layer {layer!r}: no batch reaches it, or the output does not depend on it; give inputs that do, or skip it"
    )


@public
class Sensitivity(Protocol):
    """What predicts the cost of quantizing each layer from inputs: a frozen dataclass that an entry point names.

    The entry point is of the group `mpq_plugins.sensitivities`, and its name is what `measure --sensitivity` takes; the
    class is made without arguments there, so that every field has a default.

    Attributes:
        name: How tables call what it measures.
    """

    name: ClassVar[str]

    def measure(self, job: Job) -> Mapping[str, Curves]:
        """Measure every layer of the job's table.

        Args:
            job: The model, the table and the inputs.

        Returns:
            Curves by layer name, for every layer.

        Raises:
            SettingError: A layer cannot be measured. The message names it.
        """
        ...
