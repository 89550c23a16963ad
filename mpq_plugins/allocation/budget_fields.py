"""The fields of Budget: what each takes, and how it refuses anything else."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo

from ..common.amounts import bytes_of
from ..common.checks import number, shown
from ..errors import SettingError
from ..plans.activations import INPUT_BITS
from .budget_problem import pinned_widths, plan_bits
from .fields import ranged
from .latency import LatencyTable
from .objective import parts_of

LARGEST = 1e18
ABOVE_0 = f"a number above 0, at most {LARGEST:g}"


def _bytes(value: Any, info: ValidationInfo) -> int:
    amount = number(str(info.field_name), value, ABOVE_0, above=0, most=LARGEST)
    if amount != int(amount):
        raise SettingError(f"{info.field_name}: {shown(value)} is not allowed; a whole number above 0")
    return int(value)


def _size(value: Any, info: ValidationInfo) -> int | None:
    return None if value is None else bytes_of(value, str(info.field_name))


def _latency(value: Any) -> LatencyTable | None:
    return None if value is None else LatencyTable.of(value)


def _name(value: Any) -> Any:
    parts_of(value)
    return value


def _several(value: Any) -> tuple[Any, ...]:
    """One, or a sequence of them."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _pins(value: Any) -> tuple[Any, ...]:
    entries = _several(value)
    for entry in entries:
        if not names_type(entry):
            pinned_widths(entry)
    return entries


def names_type(entry: Any) -> bool:
    """Whether a pin gives a layer a type rather than a width; which types there are, the table knows."""
    pattern, _, word = str(entry).rpartition("=")
    return isinstance(entry, str) and bool(pattern.strip()) and word.strip().isidentifier()


def _ties(value: Any) -> tuple[Any, ...]:
    entries = _several(value)
    for entry in entries:
        if not isinstance(entry, str):
            raise SettingError(
                f"tie: {shown(entry)} is not allowed; names with alternatives, as '*.{{query,key,value}}'"
            )
    return entries


def _ends(value: Any) -> int:
    return plan_bits("ends", value)


def _input_bits(value: Any) -> tuple[int, ...]:
    allowed = f"a list of one or more of {INPUT_BITS[0]} to {INPUT_BITS[-1]}"
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise SettingError(f"input_bits: {shown(value)} is not allowed; {allowed}")
    for bits in value:
        if type(bits) is not int or bits not in INPUT_BITS:
            raise SettingError(f"input_bits: {shown(bits)} is not allowed; {allowed}")
    return tuple(sorted(set(value)))


Most = Annotated[float, ranged(ABOVE_0, above=0, most=LARGEST)]
Bytes = Annotated[int, BeforeValidator(_bytes)]
Size = Annotated[int | str | None, BeforeValidator(_size)]
Costs = Annotated[LatencyTable | str | None, BeforeValidator(_latency)]
Name = Annotated[str, BeforeValidator(_name)]
Ends = Annotated[int, BeforeValidator(_ends)]
InputBits = Annotated[tuple[int, ...], BeforeValidator(_input_bits)]
Pins = Annotated[tuple[str, ...], BeforeValidator(_pins)]
Ties = Annotated[tuple[str, ...], BeforeValidator(_ties)]
