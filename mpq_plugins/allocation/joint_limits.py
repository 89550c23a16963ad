"""What a plan of weights and inputs may take: each limit as what a layer takes of it at each pair of widths."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingError
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from .joint_inputs import Inputs
from .limits import Limit, Stated, macs_of

Array = NDArray[np.float64]
Takes = Callable[[LayerStats, Sequence[int], Sequence[int]], Array]


@dataclass(frozen=True)
class PairLimit(Stated):
    """No more than `most`, which was asked for as `asked`, in `unit`, so many times `per`.

    takes(layer, bits, input_bits) is what the layer takes at each pair of widths, (bits, input_bits); beside: what else
    was counted in what was asked, in its unit. Several may have one name, of which each is kept.
    """

    name: str
    asked: float
    most: float
    unit: str
    takes: Takes
    per: float = 1.0
    beside: float = 0.0

    @classmethod
    def of_weights(cls, limit: Limit) -> "PairLimit":
        """A limit that inputs take nothing of."""

        def takes(layer: LayerStats, bits: Sequence[int], input_bits: Sequence[int]) -> Array:
            return np.repeat(limit.whole(layer, bits)[:, None], len(input_bits), axis=1)

        return cls(limit.name, limit.asked, limit.most, limit.unit, takes, limit.per, limit.beside)


def joint_bops(asked: float) -> PairLimit:
    """Multiply-accumulates x weight bits x input bits."""

    def takes(layer: LayerStats, bits: Sequence[int], input_bits: Sequence[int]) -> Array:
        return macs_of(layer) * np.outer(bits, input_bits).astype(np.float64)

    return PairLimit("bops", asked, asked, "bit operations", takes)


def average_limit(asked: float, most: float, inputs: Inputs) -> PairLimit:
    """Bits of one value of the inputs, each tensor counted once; most: bits of all, which the average allows."""
    count = max(1, values_of(inputs))
    return PairLimit("activation_average_bits", asked, most, "bits", _held(inputs.counted), per=count)


def bytes_limit(asked: int, inputs: Inputs) -> PairLimit:
    """Bytes of all inputs of one sample, each tensor counted once."""
    return PairLimit("activation_bytes", asked, 8.0 * asked, "bytes", _held(inputs.counted), per=8)


def memory_limits(asked: int, inputs: Inputs, table: LayerTable) -> Iterator[PairLimit]:
    """Bytes of the inputs that one sample needs at once, a limit for each set. Raises SettingError without sets."""
    if not table.live:
        raise SettingError(
            "activation_memory: this table does not tell which inputs are needed at once; measure_activations finds "
            "it, or limit all of them (activation_bytes)"
        )
    for live in table.live:
        held = {name: count for name, count in inputs.counted.items() if inputs.tensors[name] in live}
        yield PairLimit("activation_memory", asked, 8.0 * asked, "bytes", _held(held), per=8)


def values_of(inputs: Inputs) -> int:
    """Values of all inputs of one sample, each tensor counted once."""
    return sum(inputs.counted.values())


def _held(counted: Mapping[str, int]) -> Takes:
    def takes(layer: LayerStats, bits: Sequence[int], input_bits: Sequence[int]) -> Array:
        return np.tile(counted.get(layer.name, 0) * np.array(input_bits, np.float64), (len(bits), 1))

    return takes
