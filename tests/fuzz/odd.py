"""Odd values, and what becomes of bytes and JSON documents that somebody tampers with."""

import json
import math
import random
from collections.abc import Callable
from typing import Any

NAMES = (
    "", " ", "\x1b[31mred\x1b]0;title\x07", "[red]", "[/]", ":smile:", "a\nmpq: error: false", "\x9b2J", "\u202egpj",
    "\udc80", "\ud800", "x" * 300, "é", "../up", "/etc/passwd", "{0}", "%s", "$x$", "\0", "con\u200dv", "0",
    ".weight", "fc.weight", "\r", "\t", "\x7f", "-o", "--help",
)  # fmt: skip
NUMBERS = (
    0, -0.0, -1, 1, 2, 3, 7, 8, 9, 16, 32, 99, 255, 256, 65536, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e-320,
    1e308, math.inf, -math.inf, math.nan, True, False,
)  # fmt: skip
WORDS = (
    "0", "-1", "1", "2", "3", "8", "9", "2-8", "4,8", "8-2", "1-65536", "1e999", "nan", "inf", "-inf", "0.5",
    "1e-320", "0x10", "99999999999999999999", "1:2:0.5", "0:1e999999:1", "1:0:1", "٣", "²", "1_000", "*", "re:(",
    "re:.*", "re:(a+)+$", "role:x", "role:lm_head", "fc*=0.9", "=", "0.9", "per_channel", "per_group", "per_tensor",
    "mse", "minmax", "affine", "piecewise", "codebook", "uniform", "mixquant", "budget", "ptilmpq", "sqnr",
    "relative", "relative,mse", "tests.helpers.nets:conv_net", "json:loads", "sys:exit", "no.such:thing", "os:getcwd",
    "tests.fuzz.users:raises", "tests.fuzz.users:batches", "tests.fuzz.users:leaves", "tests.fuzz.users:score",
    "tests.fuzz.users:moves", "tests.fuzz.users:deep", "/dev/null", "/dev/full", "/dev/stdout", ".", "..", "/",
    "none/none", "loop", "pipe", "fx", "torchao", "cpu", "cuda:99", "1,3,8,8", "65536,65536,65536,65536", "0,0", "kl",
    "output_mse", "fisher", *NAMES,
)  # fmt: skip


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a few changes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        rng.choice(BYTE_CHANGES)(changed, rng)
    return bytes(changed)


def _flip(data: bytearray, rng: random.Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice((b"\0", b"\xff" * 8, b"{", b'"', b"\x1b[31m", rng.randbytes(9)))


def _repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.choice((1, 8, 64))]
    at = rng.randrange(len(data) + 1)
    data[at : at + rng.choice((0, len(piece)))] = piece


def _number(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(max(1, min(len(data), 64)))
    data[at : at + 8] = rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(8, rng.choice(("little", "big")))


BYTE_CHANGES: tuple[Callable[[bytearray, random.Random], None], ...] = (_flip, _flip, _cut, _insert, _repeat, _number)


def odd_value(rng: random.Random) -> Any:
    """Something where something else belongs."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(NAMES)
    if kind == 1:
        return rng.choice((None, [], {}, [[]], {"": 0}, [None] * 3, list(range(40))))
    if kind == 2:
        return str(rng.choice(NUMBERS))
    return rng.choice(NUMBERS)


def tampered(document: Any, rng: random.Random) -> Any:
    """The JSON document with one value, key or order changed, somewhere inside."""
    if isinstance(document, dict) and document and rng.random() < 0.9:
        return _tampered_object(dict(document), rng)
    if isinstance(document, list) and document and rng.random() < 0.9:
        changed = list(document)
        at = rng.randrange(len(changed))
        action = rng.randrange(6)
        if action == 0:
            del changed[at]
        elif action == 1:
            changed.insert(at, changed[at])
        else:
            changed[at] = tampered(changed[at], rng)
        return changed
    if isinstance(document, str) and document and rng.random() < 0.3:
        at = rng.randrange(len(document))
        return document[:at] + rng.choice(NAMES) + document[at + 1 :]
    return odd_value(rng)


def _tampered_object(changed: dict[Any, Any], rng: random.Random) -> dict[Any, Any]:
    key = rng.choice(list(changed))
    action = rng.randrange(10)
    if action == 0:
        del changed[key]
    elif action == 1:
        changed[rng.choice(NAMES)] = changed.pop(key)
    elif action == 2:
        changed[rng.choice(NAMES)] = odd_value(rng)
    else:
        changed[key] = tampered(changed[key], rng)
    return changed


def json_bytes(document: Any, rng: random.Random) -> bytes:
    """The document as some writer would have it, at times with a key twice, or in another encoding."""
    text = json.dumps(document, ensure_ascii=rng.random() < 0.8)
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]
    if rng.random() < 0.02:
        text = "[" * 100_000 + text
    return text.encode(rng.choice(("utf-8",) * 9 + ("utf-16",)), "surrogatepass")
