"""A layer's name as the pattern that names this layer alone, in one line that any terminal takes."""

import re

from ...common.patterns import REGEX

GLOB = re.compile(r"[*?[\]]")


def pattern_of(name: str) -> str:
    r"""Write the pattern of one layer, as `--pin` and its like take it.

    A name that is no pattern stands for itself. Any other is a regular expression in which whatever a reader would not
    see is spelled out: a command is copied into a terminal, which would obey it.

    Args:
        name: The layer's name.

    Returns:
        The pattern.

    Examples:
        >>> pattern_of("layer1.0.conv1"), pattern_of("experts[0]"), pattern_of("a\n")
        ('layer1.0.conv1', 're:experts\\[0\\]', 're:a\\x0a')
    """
    plain = name.isprintable() and name.strip() == name != "" and not GLOB.search(name) and not name.startswith(REGEX)
    return name if plain else REGEX + "".join(map(_escaped, name))


def _escaped(one: str) -> str:
    if one.isprintable() and not one.isspace():
        return re.escape(one)
    code = ord(one)
    return f"\\x{code:02x}" if code < 1 << 8 else f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"
