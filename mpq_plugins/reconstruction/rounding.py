"""The three ways in which weights are rounded to a plan's grids, as words.

To nearest, every weight by itself. Compensated, the weights of a layer make up for each other's errors (`compensate`).
Learned, block by block, by gradient descent (`reconstruct`).
"""

from typing import TYPE_CHECKING, Literal

from ..common.checks import shown
from ..common.text import did_you_mean, first_few
from ..errors import SettingError

if TYPE_CHECKING:  # the command line asks for the words alone
    from ..plans.plan import Plan

Rounding = Literal["nearest", "compensated", "learned"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "compensated", "learned")
NEAREST, COMPENSATED, LEARNED = ROUNDINGS
CORRECTED = "nearest, corrected"
"""What a table calls rounding to nearest with statistics and biases that suit it."""


def checked_rounding(rounding: str | None, *, calibrated: bool) -> Rounding:
    """The rounding that is meant; None is compensated on calibration inputs, and to nearest without.

    Raises:
        SettingError: The word is another, or the rounding needs calibration inputs and there are none.
    """
    if rounding is None:
        return COMPENSATED if calibrated else NEAREST
    if rounding not in ROUNDINGS:
        near = did_you_mean(str(rounding), ROUNDINGS)
        raise SettingError(f"rounding: {shown(rounding)} is not allowed; {', '.join(ROUNDINGS)}{near}")
    if rounding != NEAREST and not calibrated:
        raise SettingError(
            f"rounding: {rounding!r} needs calibration inputs; give calibrate=batches, or make some from the model's "
            "BatchNorm statistics with synthetic_batches (--calibrate, --synthetic), or round to 'nearest'"
        )
    return rounding


def refuse_stochastic(plan: "Plan", what: str) -> None:
    """Raise SettingError, naming the layers, where the plan's scheme has rounded already what something is to round.

    what: it, `compensated rounding`.
    """
    drawn = [
        repr(layer.name) for layer in plan.layers
        if not layer.in_float and getattr(layer.scheme, "stochastic", None) is not None
    ]  # fmt: skip
    if drawn:
        raise SettingError(
            f"{first_few(drawn, ', ')}: rounded stochastically, and {what} chooses other levels; round to 'nearest' "
            "(--rounding nearest), which leaves the levels to the scheme, or plan without stochastic"
        )


def rounding_label(rounding: Rounding, *, calibrated: bool) -> str:
    """What tables call it: `nearest`, `nearest, corrected`, `compensated`, `learned`."""
    return CORRECTED if calibrated and rounding == NEAREST else rounding
