"""A search for the factor of a plan's steps at which a file just takes what is asked.

What a file takes falls with the step, but not evenly: codes of weights that lie on a few values change all at once, and
compensated codes also with what was rounded before. So tries on either side are bracketed first, by moves that grow,
and then a secant and a halving take turns.
"""

import math
from dataclasses import dataclass, field

SLOPE = 0.92  # bits a weight that an octave of the step saves at one or two bits
FARTHEST = 4.0  # octaves that one move goes, at the most
NARROW = 2e-3  # octaves between two tries: codes change all at once there


@dataclass(frozen=True)
class Point:
    """A try: log2 of the factor; what it takes of what is asked; its file's bits a weight."""

    octaves: float
    taken: float
    file_bits: float


@dataclass
class StepSearch:
    """The tries so far.

    most: what is asked; close: as a share below it, near enough; finest: octaves at which all steps are as fine as they
    can be; per_bit: what a bit a weight takes of what is asked; halve: whether the last move was a secant.
    """

    most: float
    close: float
    finest: float
    per_bit: float
    tried: list[Point] = field(default_factory=list)
    halve: bool = False

    def add(self, point: Point) -> None:
        """Take in a try."""
        self.tried.append(point)

    @property
    def settled(self) -> bool:
        """Whether there is nothing better to look for."""
        last = self.tried[-1]
        if 0 <= self.most - last.taken <= self.close * self._codes(last):
            return True
        over, within = self._bracket()
        if over is None and within is not None:
            return within.octaves <= self.finest
        return over is not None and within is not None and within.octaves - over.octaves < NARROW

    def next(self) -> float:
        """The octaves to try next."""
        over, within = self._bracket()
        if over is not None and within is not None:
            self.halve = not self.halve
            share = 0.5
            if self.halve and over.file_bits > within.file_bits > 0:
                wanted = min(max(self._wanted(over), within.file_bits), over.file_bits)
                share = math.log(over.file_bits / wanted) / math.log(over.file_bits / within.file_bits)
            return over.octaves + min(max(share, 0.1), 0.9) * (within.octaves - over.octaves)
        if over is not None:
            return over.octaves + self._move(over)
        assert within is not None
        return max(within.octaves - self._move(within), self.finest)

    def _codes(self, point: Point) -> float:
        """What codes take of what is asked."""
        return point.file_bits * self.per_bit

    def _wanted(self, point: Point) -> float:
        """Bits a weight in the middle of what is near enough, as what lies beside the codes takes what it does."""
        room = self.most - point.taken - self.close / 2 * self._codes(point)
        return point.file_bits + room / self.per_bit

    def _move(self, point: Point) -> float:
        """How far the slope says, and twice as far with every try that was not far enough."""
        wanted = max(self._wanted(point), 0.1 * point.file_bits)
        octaves = abs(math.log2(point.file_bits / wanted)) * point.file_bits / SLOPE
        return float(min(max(octaves, 4 * NARROW) * 2 ** (len(self.tried) - 1), FARTHEST))

    def _bracket(self) -> tuple[Point | None, Point | None]:
        """The finest try that is within what is asked, and the coarsest one over it that is finer still."""
        within = min((p for p in self.tried if p.taken <= self.most), key=_octaves, default=None)
        over = [p for p in self.tried if p.taken > self.most and (within is None or p.octaves < within.octaves)]
        return max(over, key=_octaves, default=None), within


def _octaves(point: Point) -> float:
    return point.octaves
