"""How a reconstruction learns: what decides its result, and so goes into a checkpoint's identity."""

import sys
from dataclasses import dataclass
from typing import Any

from ..errors import SettingError

LOSSES = ("mse", "fisher")
TUNED = ("rounding", "norms")
MEMORY = 2 << 30
"""Bytes of cached inputs and outputs that are kept in memory."""


@dataclass(frozen=True)
class Settings:
    """The arguments of `reconstruct` that its result depends on; see there. Raises SettingError."""

    blocks: tuple[str, ...]
    steps: int
    batch_size: int
    lr: float
    loss: str
    regulariser: float
    mix: float
    correct: bool
    tune: str
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            _integer(name, getattr(self, name), 1, "an integer from 1 up")
        _integer("seed", self.seed, 0, "an integer from 0 up")
        _number("lr", self.lr, self.lr != 0, sys.float_info.max, "a number above 0, such as 0.003")
        _number("regulariser", self.regulariser, True, sys.float_info.max, "a number from 0 up, such as 0.01")
        _number("mix", self.mix, True, 1.0, "a probability, 0 to 1")
        for name, allowed in (("loss", LOSSES), ("tune", TUNED)):
            if getattr(self, name) not in allowed:
                raise SettingError(f"{name}: {getattr(self, name)!r} is not allowed; {', '.join(allowed)}")
        if not isinstance(self.correct, bool):
            raise SettingError(f"correct: {self.correct!r} is not allowed; True or False")
        if not all(isinstance(pattern, str) and pattern for pattern in self.blocks):
            raise SettingError(
                f"blocks: {list(self.blocks)!r} is not allowed; globs on module names, such as 'layer?.*'"
            )


def usual_lr(steps: int) -> float:
    """Such that V, which Adam moves by about this much a step, gets anywhere; Adam's own 0.001 from 6,000 steps up."""
    return min(0.02, max(0.001, 6 / steps)) if type(steps) is int and steps > 0 else 0.001


def _integer(name: str, value: Any, least: int, allowed: str) -> None:
    if type(value) is not int or not least <= value < 1 << 63:
        raise SettingError(f"{name}: {value!r} is not allowed; {allowed}")


def _number(name: str, value: Any, condition: bool, most: float, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not condition or not 0 <= value <= most:
        raise SettingError(f"{name}: {value!r:.60} is not allowed; {allowed}")


@dataclass(frozen=True)
class BlockReport:
    """What became of one block.

    nearest, learned: mean loss a sample over all calibration inputs, rounded to nearest and as it stays; changed: codes
    that are not the nearest, of `weights`; seconds: of this block, capturing included; resumed: read back from a
    checkpoint.
    """

    name: str
    layers: tuple[str, ...]
    nearest: float
    learned: float
    changed: int
    weights: int
    seconds: float
    resumed: bool = False
