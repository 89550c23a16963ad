"""How a reconstruction learns: what decides its result, and so tells its store from another's."""

from dataclasses import dataclass
from typing import Literal, get_args

from ..common.checks import integer, number, shown
from ..common.public import public
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
            integer(name, getattr(self, name), "an integer from 1 up", least=1)
        integer("seed", self.seed, "an integer from 0 up")
        number("lr", self.lr, "a number above 0, such as 0.003", above=0)
        number("regulariser", self.regulariser, "a number from 0 up, such as 0.01", least=0)
        number("mix", self.mix, "a probability, 0 to 1", least=0, most=1)
        for name, allowed in (("loss", LOSSES), ("tune", TUNED)):
            if getattr(self, name) not in allowed:
                raise SettingError(f"{name}: {getattr(self, name)!r} is not allowed; {', '.join(allowed)}")
        if not isinstance(self.correct, bool):
            raise SettingError(f"correct: {shown(self.correct)} is not allowed; True or False")
        if not all(isinstance(pattern, str) and pattern for pattern in self.blocks):
            raise SettingError(
                f"blocks: {shown(list(self.blocks))} is not allowed; globs on module names, such as 'layer?.*'"
            )


def usual_lr(steps: int) -> float:
    """Such that V, which Adam moves by about this much a step, gets anywhere; Adam's own 0.001 from 6,000 steps up."""
    return min(0.02, max(0.001, 6 / steps)) if type(steps) is int and steps > 0 else 0.001


@public
@dataclass(frozen=True)
class BlockReport:
    """What became of one block.

    Attributes:
        name: The block's name.
        layers: The layers in it.
        nearest: The mean loss a sample over all calibration inputs, with weights rounded to nearest.
        learned: The same with weights as they stay.
        changed: Codes that are not the nearest.
        weights: How many weights there are.
        seconds: Of this block, capturing included.
        resumed: Whether it was read back from a store.
    """

    name: str
    layers: tuple[str, ...]
    nearest: float
    learned: float
    changed: int
    weights: int
    seconds: float
    resumed: bool = False


Outliers = Literal["leave_out", "shorten"]
OUTLIERS = get_args(Outliers)


@dataclass(frozen=True)
class Compensation:
    """The arguments of `compensate` that its result depends on; see there. Raises SettingError."""

    columns: int
    damping: float
    seed: int
    new_biases: bool = True
    outliers: Outliers = "leave_out"

    def __post_init__(self) -> None:
        if self.outliers not in OUTLIERS:
            raise SettingError(f"outliers: {shown(self.outliers)} is not allowed; {', '.join(OUTLIERS)}")
        if not isinstance(self.new_biases, bool):
            raise SettingError(f"new_biases: {shown(self.new_biases)} is not allowed; True or False")
        integer("columns", self.columns, "an integer from 1 up, such as 65536", least=1)
        integer("seed", self.seed, "an integer from 0 up")
        number("damping", self.damping, "a number from 0 to 10, such as 0.01", least=0, most=10)


@public
@dataclass(frozen=True)
class LayerReport:
    """What became of one layer in `compensate`.

    Attributes:
        name: The layer's name.
        rounding: `compensated` or `nearest`.
        why: Why it, or some of its channels, was rounded to nearest; empty where nothing was.
        target: What it comes close to: `its own weights`, `the float output` or `the float sum`, which a shortcut is
            part of.
        columns: How many inputs it was compensated on; of a convolution, output positions.
        damping: What was added to its inputs' second moments, as a share of their mean.
        nearest: The mean squared error of an output position to the target, summed over channels, to nearest.
        compensated: The same with weights as they stay.
        changed: Weights that are not at the nearest level.
        weights: How many weights there are.
        seconds: Of this layer.
        resumed: Whether it was read back from a store.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan, reports = mpq.Uniform(bits=2)(mpq.measure(net)), []
        >>> _ = mpq.compensate(net, plan, [torch.randn(256, 8)], finished=reports.append)
        >>> [(report.name, report.rounding, report.columns) for report in reports]
        [('0', 'compensated', 256)]
    """

    name: str
    rounding: str
    why: str
    target: str
    columns: int
    damping: float
    nearest: float
    compensated: float
    changed: int
    weights: int
    seconds: float
    resumed: bool = False
