"""The work cut into units by bytes: the same units whoever does them, so that results can be kept and compared."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..plans.scheme import Scheme, needs_whole_layer
from ..weights.chunks import chunk_channels, chunks
from ..weights.handles import Weight

SMALLEST, LARGEST = 1 << 18, 1 << 26  # bytes of a unit: worth waking a thread for, and done within a second
LARGEST_SEARCHED = 1 << 22  # where ranges or breakpoints are searched for, at a hundred times the work
UNITS = 64  # that small models are cut into, so that workers finish together
WHOLE = 4  # units: a layer with one scale that is larger is shared out, pass by pass


@dataclass(frozen=True)
class Unit:
    """Pieces of layers to be measured in one go: (position of the layer, what of it)."""

    layers: tuple[int, ...]
    pieces: tuple[Weight, ...]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(piece.numel for piece in self.pieces)


@dataclass(frozen=True)
class Work:
    """units: of layers, or pieces of them, that need nothing of each other; shared: positions of layers with one scale,
    too large for one unit; size: bytes of a unit."""

    units: tuple[Unit, ...]
    shared: tuple[int, ...]
    size: int


def cut(weights: Sequence[Weight], scheme: Scheme) -> Work:
    """Units of about the same bytes, in the weights' order."""
    whole = needs_whole_layer(scheme)
    size = min(
        LARGEST_SEARCHED if scheme.searches else LARGEST, max(SMALLEST, sum(map(stored_bytes, weights)) // UNITS)
    )
    shared = tuple(
        position
        for position, weight in enumerate(weights)
        if whole and not scheme.sorts and stored_bytes(weight) > WHOLE * size and len(chunks(weight)) > 1
    )
    pieces: list[tuple[int, Weight]] = []
    for position, weight in enumerate(weights):
        if position not in shared:
            pieces += [(position, piece) for piece in ([weight] if whole else cut_layer(weight, size))]
    return Work(tuple(_gathered(pieces, size)), shared, size)


def cut_layer(weight: Weight, size: int) -> list[Weight]:
    """Runs of whole chunks of about `size` bytes."""
    per_channel = max(1, stored_bytes(weight) // max(1, weight.channels))
    step = chunk_channels(weight)
    step *= max(1, size // (per_channel * step))
    if step >= weight.channels:
        return [weight]
    return [weight.cut(start, min(start + step, weight.channels)) for start in range(0, weight.channels, step)]


def stored_bytes(weight: Weight) -> int:
    """What reading it takes."""
    return weight.numel * weight.dtype.itemsize


def _gathered(pieces: Iterable[tuple[int, Weight]], size: int) -> Iterator[Unit]:
    """Neighbours together until they are enough."""
    unit: list[tuple[int, Weight]] = []
    gathered = 0
    for position, piece in pieces:
        unit.append((position, piece))
        gathered += stored_bytes(piece)
        if gathered >= size:
            yield _unit(unit)
            unit, gathered = [], 0
    if unit:
        yield _unit(unit)


def _unit(pieces: Sequence[tuple[int, Weight]]) -> Unit:
    return Unit(tuple(position for position, _ in pieces), tuple(piece for _, piece in pieces))
