"""Fields that several allocators have, with their checks and the texts of their options."""

import sys
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo

from ..common.checks import number, shown
from ..errors import SettingError
from ..plans.granular import check_bits


def candidates(value: Any, info: ValidationInfo) -> tuple[int, ...]:
    """Bit-widths to choose from, ascending and each once. Raises SettingError."""
    if not isinstance(value, Sequence) or not value:
        raise SettingError(f"{info.field_name}: {shown(value)} is not allowed; a list of one or more of 1 to 8")
    return tuple(sorted({check_bits(b, str(info.field_name)) for b in value}))


def width(value: Any, info: ValidationInfo) -> int:
    """One bit-width. Raises SettingError."""
    return check_bits(value, str(info.field_name))


def ranged(
    allowed: str, *, least: float = -sys.float_info.max, above: float = -sys.float_info.max,
    most: float = sys.float_info.max,
) -> BeforeValidator:  # fmt: skip
    """The check of a number from `least`, or beyond `above`, to `most`; refused as what is `allowed` says."""

    def checked(value: Any, info: ValidationInfo) -> float:
        return number(str(info.field_name), value, allowed, least=least, above=above, most=most)

    return BeforeValidator(checked)


Candidates = Annotated[tuple[int, ...], "candidate bit-widths", BeforeValidator(candidates)]
Width = Annotated[int, BeforeValidator(width)]
AverageBits = Annotated[float, ranged("a number above 0, at most 64", above=0, most=64)]
