"""Naming layers: a glob, or a regular expression after `re:`, and families that differ in one word."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache

from ..errors import SettingError

REGEX = "re:"
# What inference engines fuse, so that it must agree, as the checkpoints of transformers call it.
FUSED = {
    "qkv": (
        "*.{q_proj,k_proj,v_proj}", "*.{query,key,value}", "*.{q_lin,k_lin,v_lin}", "*.{wq,wk,wv}",
        "*.{to_q,to_k,to_v}", "*.{q,k,v}",
    ),
    "gate_up": ("*.{gate_proj,up_proj}", "*.{gate_proj,up_proj}.*", "*.{w1,w3}", "*.{w1,w3}.*", "*.{wi_0,wi_1}"),
}  # fmt: skip


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern names the layer. Raises SettingError for a broken regular expression."""
    if pattern.startswith(REGEX):
        return _compiled(pattern).fullmatch(name) is not None
    return fnmatchcase(name, pattern)


def families(pattern: str, names: Iterable[str]) -> Mapping[tuple[str, ...], tuple[str, ...]]:
    """Layers that differ only where the pattern has alternatives: `*.{query,key,value}` -> one family per block.

    The key is what the pattern's `*` stood for. `qkv` and `gate_up` stand for what is usually fused (FUSED). Raises
    SettingError for a pattern without {one,another}.
    """
    if pattern in FUSED:
        names = tuple(names)
        every = [families(one, names) for one in FUSED[pattern]]
        return {
            (str(n), *key): members
            for n, grouped in enumerate(every)
            for key, members in grouped.items()
            if len(members) > 1
        }
    opening, closing = pattern.find("{"), pattern.find("}")
    if opening < 0 or closing < opening or "," not in pattern[opening:closing]:
        raise SettingError(
            f"tie: {pattern!r} names no alternatives; write '*.{{query,key,value}}' for layers that differ in that word"
        )
    head, words, tail = pattern[:opening], pattern[opening + 1 : closing].split(","), pattern[closing + 1 :]
    grouped: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        for word in words:
            captured = _captured(head + word.strip() + tail, name)
            if captured is not None:
                grouped.setdefault(captured, []).append(name)
                break
    return {key: tuple(members) for key, members in grouped.items()}


def _captured(glob: str, name: str) -> tuple[str, ...] | None:
    pieces = [re.escape(piece) for piece in glob.split("*")]
    match = re.fullmatch("(.*)".join(pieces), name)
    return None if match is None else match.groups()


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix(REGEX))
    except (re.error, OverflowError, RecursionError) as error:
        raise SettingError(f"{pattern!r}: no regular expression ({error}); write {REGEX}layer[12].*") from error
