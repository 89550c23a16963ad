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

from ..errors import SettingError
from ..models.copying import duplicate
from ..models.running import call_model, first_input
from .stations import Stations, Sum, version_of
from .streams import Stream, current


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
                pair = (Stream(partial(call_model, own[0], batch)), Stream(partial(call_model, own[1], batch)))
                pairs.append(pair)
                for stream in pair:
                    stream.start()
            while waiting := {stream.at for pair in pairs for stream in pair if stream.at is not None}:
                at = min(waiting, key=lambda station: (ranks.setdefault(station.name, len(ranks)), station.step))
                answer = handle(at, [self._arrival(at, *pair) for pair in pairs if pair[1].at == at])
                self.done.add(at)
                self._forget(at, pairs)
                # The float net's outputs are what they are: only the quantized net's are moved.
                for exact, rough in pairs:
                    if exact.at == at:
                        exact.go_on()
                    if rough.at == at:
                        rough.go_on(answer)

    def _forget(self, at: Station, pairs: Sequence[tuple[Stream, Stream]]) -> None:
        """Let go of what was kept for a layer's sum, if no other layer waits for it."""
        found = self.stations.sums.get(at.name)
        if found is None or at.step != Step.ROUND:
            return
        waiting = [layer for layer, other in self.stations.sums.items() if other.place == found.place]
        if all(Station(layer, Step.ROUND) in self.done for layer in waiting):
            for pair in pairs:
                for stream in pair:
                    stream.notes.pop(found.place, None)

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
            yield

    def _on_net(self, net: nn.Module, rough: bool) -> Iterator[Any]:
        modules = dict(net.named_modules())
        yield from self._notes(modules)
        for layer, users in self.users.items():
            for user in users:
                yield self._at_layer(modules[user], layer, rough)
        for name in self.biased:
            yield modules[name].register_forward_hook(partial(self._after, Station(name, Step.BIAS)))
        for name in self.norms:
            before = partial(self._before, Station(name, Step.NORM))
            yield modules[name].register_forward_pre_hook(before, with_kwargs=True)

    def _notes(self, modules: Mapping[str, nn.Module]) -> Iterator[Any]:
        """What is added behind layers is kept when it goes by."""
        for place in dict.fromkeys(found.place for found in self.stations.sums.values()):
            module = modules[place[0]]
            if place[1]:
                yield module.register_forward_pre_hook(partial(_note_input, place), with_kwargs=True)
            else:
                yield module.register_forward_hook(partial(_note_output, place))

    def _at_layer(self, module: nn.Module, layer: str, rough: bool) -> Any:
        rounding = Station(layer, Step.ROUND)
        if rough:
            return module.register_forward_pre_hook(partial(self._before, rounding), with_kwargs=True)
        return module.register_forward_hook(partial(self._after, rounding))

    def _before(self, station: Station, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stop(station, first_input(args, kwargs))

    def _after(self, station: Station, _: nn.Module, __: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            raise SettingError(f"layer {station.name!r}: gives a {type(output).__name__}, not a tensor; skip it")
        moved = self._stop(station, output)
        return None if moved is None or station.step != Step.BIAS else moved(output)

    def _stop(self, station: Station, value: Any) -> Any:
        stream = current()
        if stream is None or station in self.done:  # a run of somebody else's, or a further call
            return None
        return stream.stop(station, value)


def _sharing(net: nn.Module) -> nn.Module:
    """A copy of all modules, with the same parameters and buffers."""
    return duplicate(net, kept=(*net.parameters(), *net.buffers()))


def _close(pairs: Sequence[tuple[Stream, Stream]]) -> None:
    for pair in pairs:
        for stream in pair:
            stream.close()


def _note_input(place: tuple[str, bool], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _note(place, first_input(args, kwargs))


def _note_output(place: tuple[str, bool], _: nn.Module, __: Any, output: Any) -> None:
    _note(place, output)


def _note(place: tuple[str, bool], value: Any) -> None:
    stream = current()
    if stream is not None and isinstance(value, Tensor):
        stream.notes[place] = (value, version_of(value))


def _kept(stream: Stream, shortcut: Sum) -> Tensor | None:
    """What is added, if it is still what went by."""
    value, version = stream.notes.get(shortcut.place, (None, 0))
    return value if value is not None and version_of(value) == version else None
