"""How long a solve may go on, and who is told how far it is."""

import math
import time
from dataclasses import dataclass, field

from ..common.progress import Progress

QUIET = 1.0  # seconds in which nobody asks how far it is


@dataclass(frozen=True)
class Watch:
    """seconds: after which the best found so far is taken, infinite by default, so that a plan does not depend on the
    machine; progress: told of the steps done and the most there are, once the solve has taken a second."""

    seconds: float = math.inf
    progress: Progress | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds, 0 where there are none."""
        return max(0.0, self.started + self.seconds - time.monotonic())

    def tell(self, what: str, done: int, most: int) -> None:
        """Say how far it is."""
        if self.progress is not None and time.monotonic() - self.started > QUIET:
            self.progress(what, done, most)
