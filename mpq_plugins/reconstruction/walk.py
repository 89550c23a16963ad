"""The float net and the quantized net walked side by side, from station to station, all batches together.

A layer is rounded when every batch has come to it in both nets, on the inputs that the quantized prefix gives; then a
BatchNorm behind it, or its own bias, is corrected on what comes out; then both nets go on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..models.running import call_model
from .stations import Stations
from .streams import Stream


class Step(IntEnum):
    """What is done at a station."""

    ROUND = 0
    BIAS = 1
    NORM = 2


@dataclass(frozen=True)
class Station:
    """A layer or a norm, and what is done there."""

    name: str
    step: Step


@dataclass(frozen=True)
class Arrival:
    """What one batch brings to a station: the quantized net's value and the float net's, None if that is elsewhere.

    A layer's value is its input in the quantized net and its output in the float one, and its output in both where its
    bias is corrected; a norm's is its input. shortcut: (float, quantized) what is added behind the layer.
    """

    rough: Any
    exact: Any
    shortcut: tuple[Tensor, Tensor] | None = None


Handle = Callable[[Station, Sequence[Arrival]], Any]


@dataclass
class Walk:
    """Two nets and the places where they stop.

    Their parameters and buffers are to be changed in place, for each batch has a copy of the modules that shares them.

    users: layers to round -> the modules that use their weights; biased: layers whose biases are corrected; norms:
    BatchNorms whose statistics are.
    """

    exact: nn.Module
    rough: nn.Module
    stations: Stations
    users: Mapping[str, Sequence[str]]
    biased: frozenset[str]
    norms: frozenset[str]
    done: set[Station] = field(default_factory=set)

    def run(self, batches: Sequence[Any], handle: Handle) -> None:
        """Walk them on all batches. handle: does what is to be done; where a bias is
        corrected, what it gives is what the quantized net's outputs at hand go through."""
        pairs: list[tuple[Stream, Stream]] = []
        ranks = {name: rank for rank, name in enumerate(self.stations.order)}
        with ExitStack() as stack:
            stack.callback(_close, pairs)
            # A model may keep values on itself from one layer to another: each batch has modules of its own.
            nets = [(self.exact, self.rough), *((_sharing(self.exact), _sharing(self.rough)) for _ in batches[1:])]
            stack.enter_context(self._hooks(nets))
            for own, batch in zip(nets, batches, strict=True):
                pairs.append(tuple(Stream(partial(call_model, net, batch)) for net in own))  # type: ignore[arg-type]
                for stream in pairs[-1]:
                    stream.check()
            while waiting := {stream.at for pair in pairs for stream in pair if stream.at is not None}:
                at = min(waiting, key=lambda station: (ranks.setdefault(station.name, len(ranks)), station.step))
                answer = handle(at, [self._arrival(at, *pair) for pair in pairs if pair[1].at == at])
                self.done.add(at)
                # The float net's outputs are what they are: only the quantized net's are moved.
                for exact, rough in pairs:
                    if exact.at == at:
                        exact.go_on()
                    if rough.at == at:
                        rough.go_on(answer)

    def _arrival(self, at: Station, exact: Stream, rough: Stream) -> Arrival:
        together = exact.at == at
        shortcut = self.stations.sums.get(at.name) if at.step == Step.ROUND and together else None
        kept = None if shortcut is None else tuple(_kept(stream, shortcut) for stream in (exact, rough))
        whole = kept is not None and all(value is not None for value in kept)
        return Arrival(rough.value, exact.value if together else None, kept if whole else None)  # type: ignore[arg-type]

    @contextmanager
    def _hooks(self, nets: Sequence[tuple[nn.Module, nn.Module]]) -> Iterator[None]:
        """On all of them, while they are walked."""
        with ExitStack() as stack:
            for exact, rough in nets:
                for handle in (*self._on_net(exact, False), *self._on_net(rough, True)):
                    stack.enter_context(handle)
