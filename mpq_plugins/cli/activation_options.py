"""The options that say how a plan's layers have their inputs quantized."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import SettingError
from .types import Known

if TYPE_CHECKING:  # `mpq --help` should not wait for it
    from ..plans.activations import Activations

Command = TypeVar("Command", bound=Callable[..., Any])
NAMES = ("activation_range", "activation_share", "activation_dynamic", "activation_symmetric")


def _ranges() -> Iterable[str]:
    from ..plans.activations import INPUT_RANGES

    return INPUT_RANGES


def _dynamics() -> Iterable[str]:
    from ..plans.activations import DYNAMICS

    return DYNAMICS


def activation_options(command: Command) -> Command:
    """The width of inputs and what their ranges are, five options that `take_activations` takes out of a command's."""
    bits = click.option(
        "--activation-bits", type=int, help="Record bits for activations; floating point when left out."
    )
    return bits(range_options(command))


def range_options(command: Command) -> Command:
    """What the ranges of inputs are, four options that `taken_ranges` takes out of a command's."""
    for option in reversed(
        (
            click.option(
                "--activation-range", type=Known(_ranges), metavar="NAME",
                help="minmax, percentile, mse (default), kl or moving_average.",
            ),
            click.option(
                "--activation-share", type=float, help="Of values inside a percentile range; default 0.9999."
            ),
            click.option(
                "--activation-dynamic", type=Known(_dynamics), metavar="NAME",
                help="Each input's own range instead: per_tensor, per_token.",
            ),
            click.option(
                "--activation-symmetric", is_flag=True, default=None, help="Activations have 0 as the middle code."
            ),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def take_activations(options: dict[str, Any]) -> "Activations | None":
    """How inputs are quantized, taken out of a command's options; None where they stay in floating point.

    Raises SettingError where no bits are given, or two options exclude each other.
    """
    from ..plans.activations import Activations, check_input_bits

    bits = options.pop("activation_bits")
    given = taken_ranges(options)
    if bits is None:
        if given:
            option = f"activation-{next(iter(given))}"
            raise SettingError(
                f"{option}: says how activations are quantized, and no width is given; --activation-bits"
            )
        return None
    return Activations(check_input_bits(bits), **given)


def taken_ranges(options: dict[str, Any]) -> dict[str, Any]:
    """Those fields of Activations that a command's options say, taken out of them."""
    given = {name: options.pop(name) for name in NAMES}
    return {name.removeprefix("activation_"): value for name, value in given.items() if value is not None}
