"""Layers that must agree: which ones the patterns of a tie bind together."""

import warnings
from collections.abc import Sequence

from ..common.patterns import FAMILY_WORDS, agreeing, families
from ..common.text import first_few
from ..errors import PlanWarning, SettingError


def tied_layers(tie: Sequence[str], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Layer -> those that it must agree with, itself among them, where a pattern ties it. Raises SettingError."""
    for pattern in tie:
        if any(len(family) > 1 for family in families(pattern, names).values()):
            continue
        if pattern not in FAMILY_WORDS:
            raise SettingError(
                f"tie: {pattern!r} finds no layers to tie; names look like {first_few(list(names)[:3], ', ')}"
            )
        warnings.warn(PlanWarning(nothing_to_tie(pattern)), stacklevel=2)
    return agreeing(tie, names)


def nothing_to_tie(pattern: str) -> str:
    """What to say of a family that is usually fused, in a model that has none of it, or has it fused already."""
    return f"tie: {pattern} finds no layers to tie in this model; they may be one layer already"
