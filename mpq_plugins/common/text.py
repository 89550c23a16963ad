"""Text for people: what names, files and other people's errors say, without what a terminal would obey."""

import re
from collections.abc import Iterable, Sequence

SHOWN = 5  # things listed in an error before it turns to counting


def printable(text: object) -> str:
    r"""One line in which everything that a reader would not see is spelled out, as Python spells it: \x1b, \u202e.

    Control characters (newlines too), marks that reverse or join what is beside them, halves of surrogate pairs and
    spaces that look like others are what a name may hold and a terminal, a table or a picture may not. Whatever is
    printed, logged or drawn goes through here.
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(text))


def printable_lines(text: str) -> str:
    """The same for a text of several lines, each of them printable."""
    return "\n".join(printable(line) for line in text.split("\n"))


def first_few(items: Sequence[str], separator: str = "; ") -> str:
    """The first few of what is wrong, and how many more there are."""
    more = f"{separator.rstrip()} and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return separator.join(items[:SHOWN]) + more


def what_it_said(error: BaseException) -> str:
    """`TypeError: its first line`, of an exception that a user's code or a library raised."""
    try:
        lines = str(error).splitlines()
    except Exception:  # noqa: BLE001  # an outsider's exception may not even be printable
        lines = []
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def first_sentence(error: Exception) -> str:
    """The first line a library's message has anything on, without colours, at a length that can be read."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch colours some of its messages
    text = next((line.strip() for line in plain.splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 160 else f"{text[:157]}..."


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """`. Did you mean uniform?` for `unifrom`, to end a refusal with; empty where nothing is near."""
    from difflib import get_close_matches

    near = get_close_matches(given, list(names), 1)
    return f". Did you mean {near[0]}?" if near else ""
