"""What is measured of a layer, and of all layers: numbers alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..common.public import public
from .activations import Activations
from .group_sizes import fitted_to
from .scheme import Scheme

METRICS = ("relative", "mse", "rmse", "sqnr_db", "max_abs")
Array = NDArray[np.float64]


@public
@dataclass(frozen=True, eq=False)
class CodedCurve:
    """What a layer's weights cost and lose at a ladder of steps, entropy coded.

    Attributes:
        steps: The steps, ascending, (steps,); the first is the finest whose codes have 8 bits.
        bits: The entropy of the layer's codes, each of its own histogram, in bits for the whole layer, (steps,).
        squared_error: The sum of (w - w')^2 over the layer, (steps,).

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> table = mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8)), mpq.EntropyCoded())
        >>> table.layers[0].coded.steps.shape
        (73,)
    """

    steps: Array
    bits: Array
    squared_error: Array


@public
@dataclass(frozen=True, eq=False)
class InputStats:
    """What is measured of a layer's input.

    Attributes:
        numel: Values of one sample's input; of all calls together, where a sample calls the layer several times.
        tensor: The name of the first layer, in the order of calls, that reads the same tensor: its own, or another's.
        errors: The errors by metric, (input widths,) each, in the order of the table's `input_bits`.
        sensitivities: By name what quantizing this input alone is predicted to cost, (input widths,), in the
            sensitivity's own unit.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> table = mpq.measure_activations(net, mpq.measure(net), [torch.randn(4, 8)])
        >>> table.layers[0].inputs.numel
        8
    """

    numel: int
    tensor: str
    errors: Mapping[str, Array]
    sensitivities: Mapping[str, Array] = field(default_factory=dict)


@public
@dataclass(frozen=True, eq=False)  # arrays have no single truth value; a layer is itself
class LayerStats:
    """One layer's numbers.

    Attributes:
        name: Its name in the model, without `.weight`.
        kind: What it is, as `linear` or `conv2d`.
        shape: The weight's shape.
        channel_axis: The axis of output channels.
        importance: F_l = sum |w|.
        channel_importance: F_c = ||w_c||_2, (channels,).
        errors: The errors by metric, (bit-widths,) each, in the order of the table's `bits`.
        channel_errors: The errors of each output channel by metric, (bit-widths, channels); empty unless asked for.
        sensitivities: By name what quantizing the whole layer is predicted to cost, (bit-widths,), in the sensitivity's
            own unit, so that layers add up.
        channel_sensitivities: The same of each output channel, (bit-widths, channels), for those that can tell.
        coded: Entropies and errors at a ladder of steps; None under schemes that have none.
        inputs: What was measured of its input; None where nothing was.
        macs: Multiply-accumulates for the example input, where one was given.
        tied: Other names of the same weight.
        digest: The weight's own; see fingerprint.layer_digest.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    channel_axis: int
    importance: float
    channel_importance: Array
    errors: Mapping[str, Array]
    channel_errors: Mapping[str, Array] = field(default_factory=dict)
    sensitivities: Mapping[str, Array] = field(default_factory=dict)
    channel_sensitivities: Mapping[str, Array] = field(default_factory=dict)
    coded: CodedCurve | None = None
    inputs: InputStats | None = None
    macs: int | None = None
    tied: tuple[str, ...] = ()
    digest: str = ""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.shape[self.channel_axis]


@dataclass(frozen=True, eq=False)
class Measured:
    """What a table holds: the layers, on which weights, under which scheme."""

    layers: tuple[LayerStats, ...]
    scheme: Scheme
    bits: tuple[int, ...]
    metrics: tuple[str, ...]
    fold_bn: bool
    fingerprint: str
    skipped: tuple[str, ...] = ()
    left_alone: tuple[tuple[str, str], ...] = ()
    weights: str | None = None  # the key of those in a torch checkpoint (see Weights.key)
    rest_bytes: int | None = None  # of all that is stored beside the layers' weights (see weights/rest.py)
    activations: Activations | None = None  # how inputs were quantized at each of the input widths
    input_bits: tuple[int, ...] = ()
    live: tuple[tuple[str, ...], ...] = ()  # the largest sets of inputs, by InputStats.tensor, that are needed at once

    def scheme_of(self, layer: LayerStats) -> Scheme:
        """Give the scheme that a layer was measured under.

        That is the table's, but for layers whose inputs do not divide into its groups: these have groups of the largest
        power of two that is smaller, divides their inputs and is 16 or more, or else one group an output channel.

        Args:
            layer: The layer, of this table.

        Returns:
            Its scheme.
        """
        return fitted_to(self.scheme, layer.shape, layer.channel_axis)

    @property
    def sensitivities(self) -> tuple[str, ...]:
        """Names of the sensitivities that every layer has."""
        return tuple(self.layers[0].sensitivities) if self.layers else ()

    @property
    def channel_sensitivities(self) -> tuple[str, ...]:
        """Names of those that every layer has for each of its channels."""
        return tuple(self.layers[0].channel_sensitivities) if self.layers else ()
