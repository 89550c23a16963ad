import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.common.text import printable, printable_lines

ANY_TEXT = st.text(st.characters())  # surrogates included


@given(ANY_TEXT)
def test_nothing_that_a_terminal_would_obey_is_left(text: str) -> None:
    shown = printable(text)
    assert all(unicodedata.category(one) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for one in shown)
    shown.encode()  # no half of a surrogate pair either


@given(ANY_TEXT)
def test_what_can_be_seen_is_left_as_it_is(text: str) -> None:
    plain = "".join(one for one in text if one.isprintable())
    assert printable(plain) == plain


@given(st.lists(ANY_TEXT))
def test_lines_are_made_printable_one_by_one(texts: list[str]) -> None:
    lines = [text.replace("\n", "") for text in texts]
    assert printable_lines("\n".join(lines)) == "\n".join(map(printable, lines))


def test_what_is_spelled_out_is_spelled_as_python_does() -> None:
    assert printable("\x1b[31mé\u202e\udc80\n\x9b\U000e0001") == r"\x1b[31mé\u202e\udc80\n\x9b\U000e0001"
    assert printable(ValueError("a\tb")) == r"a\tb"
