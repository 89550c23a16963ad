"""Layers that must agree: which ones the patterns of a tie bind together."""

import warnings
from collections.abc import Sequence

from ..common.patterns import FUSED, families
from ..common.text import first_few
from ..errors import PlanWarning, SettingError


def tied_layers(tie: Sequence[str], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Layer -> those that it must agree with, itself among them, where a pattern ties it. Raises SettingError."""
    tied: dict[str, tuple[str, ...]] = {}
    for pattern in tie:
        matched = families(pattern, names).values()
        if not any(len(family) > 1 for family in matched):
            if pattern not in FUSED:
                raise SettingError(
                    f"tie: {pattern!r} finds no layers to tie; names look like {first_few(list(names)[:3], ', ')}"
                )
            warnings.warn(PlanWarning(nothing_to_tie(pattern)), stacklevel=2)
        for family in matched:
            for name in family:
                if tied.setdefault(name, family) != family:
                    raise SettingError(f"tie: layer {name!r} is in two groups; give one pattern for it")
    return tied


def nothing_to_tie(pattern: str) -> str:
    """What to say of a family that is usually fused, in a model that has none of it, or has it fused already."""
    return f"tie: {pattern} finds no layers to tie in this model; they may be one layer already"
