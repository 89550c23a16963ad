"""Sets of output channels, kept as runs: millions in a row take no more room than one."""

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

MOST_CHANNELS = 1 << 24  # of a layer; none has more

_RUN = re.compile(r"([0-9]{1,8})(?:-([0-9]{1,8}))?")


class Channels(Sequence[int]):
    """Channels that ascend, as a sequence of integers; equal to a tuple of the same. Its text is `0-2,5`."""

    __slots__ = ("_ends", "_starts", "_stops")

    def __init__(self, starts: Iterable[int], stops: Iterable[int]) -> None:
        """Runs from each start to before its stop, ascending and apart."""
        self._starts, self._stops = np.asarray(starts, np.int64), np.asarray(stops, np.int64)
        self._ends = np.cumsum(self._stops - self._starts)

    @classmethod
    def of(cls, channels: "str | Iterable[int]") -> "Channels":
        """From a text of runs, or from integers. Raises ValueError where they do not ascend, or are none."""
        if isinstance(channels, Channels):
            return channels
        return _parsed(channels) if isinstance(channels, str) else _joined(channels)

    @property
    def runs(self) -> "tuple[NDArray[np.int64], NDArray[np.int64]]":
        """Where runs start, and where they have ended."""
        return self._starts, self._stops

    def array(self) -> NDArray[np.int64]:
        """Every channel, (channels,)."""
        before = np.concatenate(([0], self._ends[:-1])) if len(self._ends) else self._ends
        indices: NDArray[np.int64] = np.arange(len(self)) + np.repeat(self._starts - before, self._stops - self._starts)
        return indices

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, position: int) -> int: ...
    @overload
    def __getitem__(self, position: slice) -> tuple[int, ...]: ...
    def __getitem__(self, position: int | slice) -> int | tuple[int, ...]:
        if isinstance(position, slice):
            return tuple(self.array()[position].tolist())
        place = range(len(self))[position]
        run = int(np.searchsorted(self._ends, place, side="right"))
        return int(self._stops[run] - (self._ends[run] - place))

    def __iter__(self) -> Iterator[int]:
        for start, stop in zip(self._starts.tolist(), self._stops.tolist(), strict=True):
            yield from range(start, stop)

    def __contains__(self, channel: object) -> bool:
        if not isinstance(channel, int):
            return False
        run = int(np.searchsorted(self._stops, channel, side="right"))
        return run < len(self._starts) and bool(self._starts[run] <= channel)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Channels):
            return np.array_equal(self._starts, other._starts) and np.array_equal(self._stops, other._stops)
        return isinstance(other, tuple) and len(self) == len(other) and tuple(self) == other

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Channels.of({str(self)!r})"

    def __str__(self) -> str:
        pairs = zip(self._starts.tolist(), self._stops.tolist(), strict=True)
        return ",".join(str(start) if stop == start + 1 else f"{start}-{stop - 1}" for start, stop in pairs)


def cover(parts: Sequence[Channels], channels: int) -> bool:
    """Whether every one of so many channels is in one part, and in one alone."""
    if sum(map(len, parts)) != channels:
        return False
    starts = np.concatenate([part.runs[0] for part in parts])
    stops = np.concatenate([part.runs[1] for part in parts])
    order = np.argsort(starts)
    return np.array_equal(starts[order], np.concatenate(([0], stops[order][:-1])))


def joined(parts: Iterable[Channels]) -> Channels:
    """The channels of several sets that have none in common, as one."""
    starts, stops = (np.sort(np.concatenate(ends)) for ends in zip(*(part.runs for part in parts), strict=True))
    apart = np.concatenate(([True], starts[1:] != stops[:-1]))
    return Channels(starts[apart], stops[np.concatenate((apart[1:], [True]))])


def _parsed(text: str) -> Channels:
    """'0-2,5' -> 0, 1, 2, 5; nothing is made of a run but its ends."""
    starts, stops = array("q"), array("q")
    place, end = 0, -1
    while end < len(text):
        run = _RUN.match(text, place)
        first, last = (int(run[1]), int(run[2] or run[1])) if run is not None else (0, -1)
        end = run.end() if run is not None else place
        if not (stops[-1] if stops else 0) <= first <= last < MOST_CHANNELS or text[end : end + 1] not in ("", ","):
            raise ValueError(
                f"{text[place : place + 40].split(',')[0]!r} is no channel or run of channels that ascend, below "
                f"{MOST_CHANNELS}; write '0-2,5'"
            )
        if stops and stops[-1] == first:
            stops[-1] = last + 1
        else:
            starts.append(first)
            stops.append(last + 1)
        place = end + 1
    return Channels(starts, stops)


def _joined(channels: Iterable[int]) -> Channels:
    if isinstance(channels, range) and channels.step == 1 and channels.start >= 0:
        return Channels([channels.start], [channels.stop]) if len(channels) else Channels([], [])
    values = channels if isinstance(channels, np.ndarray) else np.asarray(list(channels))
    if values.size == 0:
        return Channels([], [])
    ascending = values.ndim == 1 and values.dtype.kind in "iu" and values[0] >= 0 and (np.diff(values) > 0).all()
    if not ascending or values[-1] >= MOST_CHANNELS:
        raise ValueError(f"{values.tolist()!r:.40} is no list of channels that ascend, below {MOST_CHANNELS}")
    breaks = np.flatnonzero(np.diff(values) > 1)
    starts = values[np.concatenate(([0], breaks + 1))]
    return Channels(starts, values[np.concatenate((breaks, [len(values) - 1]))] + 1)
