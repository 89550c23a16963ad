import json
from pathlib import Path
from typing import Any

import pytest

from mpq_plugins import LatencyTable
from mpq_plugins.errors import FormatError, SettingError
from tests.helpers.says import naming

TIMES = {"conv1": {"4": 0.5, "8": 1.25}, "fc": {"4": 2, "8": 3, "32": 9.5}}


def test_a_mapping_and_its_file_are_the_same_table(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(TIMES))
    table = LatencyTable.of(TIMES)
    assert table == LatencyTable.of(path) == LatencyTable.of(str(path)) == LatencyTable.of(table)
    assert hash(table) == hash(LatencyTable.of(path))
    assert table == LatencyTable.of({name: {int(b): cost for b, cost in own.items()} for name, own in TIMES.items()})


def test_a_curve_is_in_the_order_that_was_asked() -> None:
    table = LatencyTable.of(TIMES)
    assert table.curve("fc", (8, 4, 32, 8)) == [3.0, 2.0, 9.5, 3.0]
    assert table.curve("conv1", ()) == []


def test_what_was_not_timed_is_refused() -> None:
    with pytest.raises(SettingError, match=naming("latency", "'conv1'", 4, 8, "not 2, 3", "time")):
        LatencyTable.of(TIMES).curve("conv1", (2, 3, 4))
    with pytest.raises(SettingError, match="latency: 'conv9' has no bit-width, and not 4"):
        LatencyTable.of(TIMES).curve("conv9", (4,))


def test_it_names_itself_by_what_it_holds() -> None:
    table = LatencyTable.of(TIMES)
    assert str(table).startswith("2 layers, sha256:")
    assert str(table) == str(LatencyTable.of(TIMES))
    assert str(table) != str(LatencyTable.of(TIMES | {"fc": {"4": 2, "8": 3.01, "32": 9.5}}))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "latency: {} is no table; write {"),
        ([1, 2], r"latency: \[1, 2\] is no table"),
        (None, "latency: None is no table"),
        ({"a": 3}, "latency: 'a': 3 is no table of bits and costs"),
        ({"a": {}}, "latency: 'a': {} is no table of bits and costs"),
        ({"a": {"4": 1, 4: 1}}, "latency: 'a': .* has a width twice"),
        *(
            ({"a": {bits: 3}}, f"latency: 'a': {bits!r} bits are not allowed; 1 to 8, or 16 or 32")
            for bits in ("four", "-3", -3, "99", 99, 0, True, 4.5, "04", "4_0", "٤", "²", " 4")
        ),
        ({"a": {"4.5": 3}}, r"latency: 'a': '4\.5' bits are not allowed"),
        ({"a": {"+4": 3}}, r"latency: 'a': '\+4' bits are not allowed"),
        ({"a": {4: None}}, "latency: 'a' at 4 bits: None is not allowed; a number from 0 up"),
        ({"a": {4: "3"}}, "latency: 'a' at 4 bits: '3' is not allowed"),
        ({"a": {4: True}}, "latency: 'a' at 4 bits: True is not allowed"),
        ({"a": {4: 10**400}}, "latency: 'a' at 4 bits: 1000.* is not allowed"),
        ({"a": {4: -1.0}}, r"latency: 'a' at 4 bits: -1\.0 is not allowed; a number from 0 up"),
        ({"a": {4: float("nan")}}, "latency: 'a' at 4 bits: nan"),
        ({"a": {4: float("inf")}}, "latency: 'a' at 4 bits: inf"),
    ],
)
def test_what_is_no_table_is_refused(layers: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        LatencyTable.of(layers)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", FormatError, "latency.json: not JSON"),
        ("[" * 100_000, FormatError, "latency.json: not JSON"),
        ("[]", FormatError, "latency.json: holds a list; write"),
        ('{"a": {"4": -3}}', SettingError, "latency: 'a' at 4 bits"),
        ('{"a": {"4": 3, "4": 3}}', FormatError, r"latency.json: not JSON \('4' appears twice\)"),
        ('{"a": {"4": 3}, "a": {"4": 3}}', FormatError, r"latency.json: not JSON \('a' appears twice\)"),
        ('{"a": {"4": NaN}}', FormatError, "NaN is no number"),
        ('{"a": {"4": 1e999}}', FormatError, "1e999 is beyond all numbers here"),
        ('{"a\\ud800": {"4": 3}}', FormatError, "half a surrogate pair"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    path = tmp_path / "latency.json"
    path.write_text(text)
    with pytest.raises(error, match=message):
        LatencyTable.of(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nowhere: cannot read it"):
        LatencyTable.of(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"cannot read it .*directory"):
        LatencyTable.of(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="bytes: not JSON"):
        LatencyTable.of(tmp_path / "bytes")
