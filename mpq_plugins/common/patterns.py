"""Naming layers: a glob, or a regular expression after `re:`, and families that differ in some words."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from itertools import product

from ..errors import SettingError

REGEX = "re:"
# What inference engines fuse, so that it must agree, as the checkpoints of transformers call it.
FUSED = {
    "qkv": (
        "*.{q_proj,k_proj,v_proj}", "*.{query,key,value}", "*.{q_lin,k_lin,v_lin}", "*.{wq,wk,wv}",
        "*.{to_q,to_k,to_v}", "*.{q,k,v}", "*.{q_a_proj,kv_a_proj_with_mqa}",
    ),
    "gate_up": (
        "*.{gate_proj,up_proj}", "*.{gate_proj,up_proj}.*", "*.{w1,w3}", "*.{w1,w3}.*", "*.{wi_0,wi_1}",
        "*.experts.mlp.{w1,v1}.*",
    ),
}  # fmt: skip
EXPERTS = "experts"
FAMILY_WORDS = (*FUSED, EXPERTS)
"""Words that stand for layers as models usually call them, so that a model may have none of them."""
# What holds a layer's experts, in the path of one of them: a number follows it, or ends the name of one in a stack.
_HOLDER = r"(?:(?!shared)\w+_)?(?:experts?|exps)"
_EXPERT = re.compile(
    rf"((?:.*\.)?{_HOLDER})\.(?:[0-9]+(?:\..+)?|(?:.+\.)?[^.0-9][^.]*\.[0-9]+)"
    r"|((?:.*\.)?(?:\w+_)?moe)\.(?!shared|router|gate\.)[^.0-9][^.]*\.[0-9]+"
)
_BRACES = re.compile(r"\{([^{}]*)\}")


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern names the layer. Raises SettingError for a broken regular expression."""
    if pattern.startswith(REGEX):
        return _compiled(pattern).fullmatch(name) is not None
    return fnmatchcase(name, pattern)


def families(pattern: str, names: Iterable[str]) -> Mapping[tuple[str, ...], tuple[str, ...]]:
    """Layers that differ only where the pattern has alternatives: `*.{query,key,value}` -> one family per block.

    The key is what the pattern's `*` stood for. `qkv` and `gate_up` stand for what is usually fused (FUSED), and
    `experts` for all matrices of all experts of a layer. Raises SettingError for a pattern without {one,another}.
    """
    if pattern == EXPERTS:
        return _several(_grouped((key, name) for name in names if (key := _experts_of(name)) is not None))
    if pattern in FUSED:
        names = tuple(names)
        every = [families(one, names) for one in FUSED[pattern]]
        return _several({(str(n), *key): members for n, found in enumerate(every) for key, members in found.items()})
    words = [[word.strip() for word in inside.split(",")] for inside in _BRACES.findall(pattern)]
    if not any(len(alternatives) > 1 for alternatives in words):
        raise SettingError(
            f"tie: {pattern!r} names no alternatives; write '*.{{query,key,value}}' for layers that differ in that word"
        )
    between = _BRACES.sub("\0", pattern).split("\0")
    globs = [_as_regex(_filled(between, chosen)) for chosen in product(*words)]
    found = (
        (next((match.groups() for glob in globs if (match := glob.fullmatch(name))), None), name) for name in names
    )
    return _grouped((key, name) for key, name in found if key is not None)


def agreeing(patterns: Iterable[str], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Layer -> those that it must agree with, itself among them, by several patterns; a family inside another is in it.

    Raises SettingError where two families have some layers in common and neither has all of the other's.
    """
    found = [family for pattern in patterns for family in families(pattern, names).values()]
    tied: dict[str, tuple[str, ...]] = {}
    for family in sorted(found, key=len, reverse=True):
        larger = tied.get(family[0], family)
        for name in family:
            if tied.get(name, family) is not larger or not set(family) <= set(larger):
                raise SettingError(f"tie: layer {name!r} is in two groups; give one pattern for it")
        tied |= dict.fromkeys(larger, larger)
    return tied


def _several(grouped: Mapping[tuple[str, ...], tuple[str, ...]]) -> dict[tuple[str, ...], tuple[str, ...]]:
    return {key: members for key, members in grouped.items() if len(members) > 1}


def _grouped(pairs: Iterable[tuple[tuple[str, ...], str]]) -> dict[tuple[str, ...], tuple[str, ...]]:
    grouped: dict[tuple[str, ...], list[str]] = {}
    for key, name in pairs:
        grouped.setdefault(key, []).append(name)
    return {key: tuple(members) for key, members in grouped.items()}


def _experts_of(name: str) -> tuple[str] | None:
    """What holds the experts that a layer is of, which shared ones are none of."""
    match = _EXPERT.fullmatch(name)
    return None if match is None else (match[1] or match[2],)


def _filled(between: Sequence[str], words: Sequence[str]) -> str:
    """A pattern with one word of each pair of braces."""
    return between[0] + "".join(word + rest for word, rest in zip(words, between[1:], strict=True))


def _as_regex(glob: str) -> re.Pattern[str]:
    return re.compile("(.*)".join(re.escape(piece) for piece in glob.split("*")))


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix(REGEX))
    except (re.error, OverflowError, RecursionError) as error:
        raise SettingError(f"{pattern!r}: no regular expression ({error}); write {REGEX}layer[12].*") from error
