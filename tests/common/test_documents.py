"""The one reader of JSON: what readers of JSON agree on, and nothing else."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.common.checks import as_integer
from mpq_plugins.common.documents import load_json, parse_json
from mpq_plugins.models.kinds import KINDS as KINDS_OF_MODULES
from mpq_plugins.plans.layers import KINDS
from mpq_plugins.weights.from_checkpoint import KIND_BY_DIMENSIONS

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
)


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    return all(map(finite, value)) if isinstance(value, list) else not isinstance(value, float) or math.isfinite(value)


@pytest.mark.slow
@given(values)
def test_what_is_written_is_read_unless_it_is_no_number(value: Any) -> None:
    text = json.dumps(value)
    if finite(value):
        assert parse_json(text) == parse_json(text.encode()) == value
    else:
        with pytest.raises(ValueError, match="is no number"):
            parse_json(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "'a' appears twice"),
        ('[{"b": {"a": 1, "c": 2, "a": 3}}]', "'a' appears twice"),
        ("[1e400]", "1e400 is beyond all numbers"),
        ("[-1e400]", "-1e400 is beyond all numbers"),
        ('{"\\ud800": 1}', "holds half a surrogate pair"),
        ('["\\udfff"]', "holds half a surrogate pair"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested more than 64 deep"),
        ("9" * 5000, "Exceeds the limit"),
        ("\ufeff{}", "BOM"),
        ("[٣]", "Expecting value"),
        ("[1,]", "Expecting value|trailing comma"),
        ("{} {}", "Extra data"),
        ("[" + "[]," * (1 << 22) + "0]", "holds more than 4194304 lists and objects"),
    ],
)
def test_what_readers_take_differently_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_whole_surrogate_pairs_are_text() -> None:
    assert parse_json('"\\ud83d\\ude00"') == "😀"
    assert parse_json("[" * 64 + "]" * 64)


@pytest.mark.parametrize("data", [b"\xff\xfe[\x00]\x00", b'"\xff"', b'"\xed\xa0\x80"'])
def test_bytes_that_are_no_utf_8_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="utf-8"):
        parse_json(data)


def test_files_have_an_end(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1]")
    assert load_json(path, 3) == [1]
    with pytest.raises(OSError, match="it has 3 bytes, and 2 is the most"):
        load_json(path, 2)
    with pytest.raises(OSError, match="it is a directory"):
        load_json(tmp_path)
    with pytest.raises(OSError, match="no file can be called so"):
        load_json(Path("a\0b"))


@given(st.text(st.characters(categories=["Nd", "Nl", "No"]) | st.sampled_from("0123456789-+_ .e"), max_size=25))
def test_only_ascii_digits_write_integers(text: str) -> None:
    if text and set(text) <= set("0123456789") and len(text) <= 18:
        assert as_integer(text) == int(text)
    else:
        assert as_integer(text) is None


def test_every_kind_of_layer_can_be_in_a_file() -> None:
    assert set(KINDS) == {*KINDS_OF_MODULES.values(), *KIND_BY_DIMENSIONS.values()}
