"""What a bit is worth in loss, found from pass to pass so that a layer's codes take what is promised."""

import math
from dataclasses import dataclass

FULL = 0.99  # of what is promised is used, at least, where lambda is not 0
GAIN = 2.5  # d log(bits) / d lambda at 0, about
FASTEST = 4.0  # times as large lambda is after a pass, at most
NARROW = 1e-3  # of lambda that is left to search, below which codes change all at once


@dataclass
class Lambda:
    """The search for lambda. promised: bits.

    low, high: lambdas, and log(bits) of passes with them, that took too many bits and that did not; free: log(bits) of
    lambda 0.
    """

    promised: float
    value: float = 0.0
    free: float = math.inf
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None

    def full(self, bits: float) -> bool:
        """Whether the promise is kept, and by no more than has to be."""
        return bits <= self.promised and (self.value == 0 or bits >= FULL * self.promised)

    @property
    def exhausted(self) -> bool:
        """Whether there is next to nothing between a lambda that takes too many bits and one that takes too few."""
        return self.low is not None and self.high is not None and self.high[0] - self.low[0] < NARROW * self.high[0]

    def forget(self) -> None:
        """What passes with other costs took says little of the next ones."""
        self.low = self.high = None

    def look_on(self, bits: float) -> None:
        """Set lambda by what a pass with the one so far took."""
        now, aim = math.log(max(bits, 1.0)), math.log(max(self.promised * (1 + FULL) / 2, 1.0))
        self._note(now, bits > self.promised)
        low = (0.0, self.free) if self.low is None else self.low
        if self.high is None:
            gain = (self.free - now) / self.value if self.value and self.free > now else GAIN
            step = (now - aim) / gain
            self.value += step if not self.value else min(max(step, 0.02 * self.value), (FASTEST - 1) * self.value)
        else:
            share = (low[1] - aim) / (low[1] - self.high[1]) if math.inf > low[1] > self.high[1] else 0.5
            self.value = low[0] + min(max(share, 0.1), 0.9) * (self.high[0] - low[0])

    def _note(self, now: float, too_many: bool) -> None:
        if self.value == 0:
            self.free = now
        if too_many:
            self.low = (self.value, now)
            self.high = self.high if self.high is not None and self.high[0] > self.value else None
        else:
            self.high = (self.value, now)
            self.low = self.low if self.low is not None and self.low[0] < self.value else None
