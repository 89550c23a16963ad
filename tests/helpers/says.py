"""What a message must name (the thing, the value, the remedy), in whatever words and order."""

import re


def naming(*facts: object) -> str:
    """A pattern for `match=`: the message has every one of these, numbers and names whole."""
    return r"(?s)\A" + "".join(f"(?=.*{_whole(str(fact))})" for fact in facts)


def names(message: object, *facts: object) -> bool:
    """Whether it does; of an error, its text."""
    return re.search(naming(*facts), str(message)) is not None


def _whole(fact: str) -> str:
    """3 is not in 13, nor conv1 in conv10."""
    before = r"(?<!\w)" if re.match(r"\w", fact) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", fact) else ""
    return before + re.escape(fact) + after
