"""Which of the layers found are meant: patterns and roles to skip, or to take alone."""

from collections.abc import Sequence

from ..common.checks import words
from ..common.patterns import matches
from ..errors import SettingError
from .handles import Weight
from .roles import PREFIX, Config, in_role

PATTERNS = "a list of names or patterns of layers, as ['fc', 'conv*']"


def select(
    weights: Sequence[Weight], skip: Sequence[str], only: Sequence[str], where: str, config: Config
) -> list[Weight]:
    """The layers that `skip` and `only` leave. Raises SettingError for a pattern that matches nothing."""
    names = [name for weight in weights for name in weight.names]
    chosen: dict[str, set[str]] = {"skip": set(), "only": set()}
    for option, patterns in (("skip", skip), ("only", only)):
        for pattern in words(option, patterns, PATTERNS):
            matching = _chosen(pattern, weights, config)
            chosen[option] |= matching
            if not matching:
                raise SettingError(
                    f"{option}: {pattern!r} matches none of the {len(weights)} layers of {where}; "
                    f"names look like {', '.join(map(repr, names[:3])) or 'nothing, there are none'}"
                )
    return [w for w in weights if (not only or w.name in chosen["only"]) and w.name not in chosen["skip"]]


def _chosen(pattern: str, weights: Sequence[Weight], config: Config) -> set[str]:
    """By any of its names: a tied weight cannot be skipped under one and quantized under another."""
    if pattern.startswith(PREFIX):
        return in_role(pattern.removeprefix(PREFIX), weights, config)
    return {weight.name for weight in weights if any(matches(pattern, name) for name in weight.names)}


def why_none(weights: Sequence[Weight], left_alone: Sequence[tuple[str, str]]) -> str:
    """Why no layer is left to quantize, and what to do about it."""
    if weights and not any(reason.startswith(PREFIX) for _, reason in left_alone):
        return f"All {len(weights)} layers are skipped; relax skip or only."
    if left_alone:
        name, reason = left_alone[0]
        return f"{len(left_alone)} tensors were left alone, the first being {name!r}: {reason}."
    return "It holds no tensor of two or more dimensions."
