"""Text for people: what names, files and other people's errors say, without what a terminal would obey."""


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
