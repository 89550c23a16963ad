"""Damaged tables: each an error naming the file and what is wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mpq_plugins import Affine, EntropyCoded, LayerTable, measure
from mpq_plugins.errors import FormatError, MeasureWarning, SettingError
from mpq_plugins.plans.table_file import is_table
from tests.helpers.nets import conv_net
from tests.helpers.says import naming
from tests.helpers.tables import contents, resealed, version_1, version_2, version_3, version_4


def damaged(path: Path, arrays: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A measured table, changed."""
    measure(conv_net(), per_channel=True).save(path)
    return resealed(path, arrays, **changes)


@pytest.mark.parametrize(
    ("arrays", "changes", "message"),
    [
        ({"errors": None}, {}, "array 'errors' should be F64 .* got nothing"),
        ({"errors": np.zeros((4, 2, 7), np.int8)}, {}, "got I8"),
        ({"importance": np.array([1, 2, np.nan, 4.0])}, {}, "array 'importance' holds NaN"),
        ({"channel_errors": np.zeros((1, 1, 1))}, {}, "array 'channel_errors'"),
        ({}, {"version": 6}, "table version 6, and this mpq-plugins reads 1 to 5"),
        ({}, {"rest_bytes": -1}, "rest_bytes"),
        ({}, {"shape": []}, r"layers\[0\]\.shape"),
        ({}, {"shape": [-8, 3, 3, 3]}, r"layers\[0\]\.shape\[0\]"),
        ({}, {"channel_axis": 7}, r"layers\[0\]: layer .*: channel_axis 7 does not fit shape"),
        ({}, {"name": "conv2"}, "layers: 'conv2' appears more than once"),
        ({}, {"skipped": ["conv2"]}, "skipped: 'conv2' is a layer as well"),
        ({}, {"kind": "lstm"}, r"layers\[0\]\.kind"),
        ({}, {"shape": [8, 10**400, 3, 3]}, "is beyond any memory"),
        ({}, {"shape": [8, 3 << 40, 3, 3]}, "is beyond any memory"),
        ({}, {"macs": -1}, r"layers\[0\]\.macs"),
        ({}, {"macs": "1"}, r"layers\[0\]\.macs"),
        ({}, {"fold_bn": 0}, "fold_bn"),
        ({}, {"bits": [2, 3, 4, 5, 6, 7, 0]}, r"bits: \[2, .*0\] is not allowed; some of 1 to 8, ascending, each once"),
        ({}, {"bits": [2, 3, 4, 5, 6, 7, 7]}, "bits: .* is not allowed"),
        ({}, {"bits": [2, 3, 4, 5, 6, 7, 300]}, "bits: .* is not allowed"),
        ({}, {"bits": []}, "bits"),
        ({}, {"metrics": ["mse", "mse"]}, "metrics: .* has one twice"),
        ({}, {"metrics": ["relative", "colour"]}, "metrics: 'colour' is not allowed; relative, mse"),
        ({"errors": -np.ones((4, 2, 7))}, {}, "array 'errors' holds negative or infinite values"),
        ({"errors": np.full((4, 2, 7), np.inf)}, {}, "array 'errors' holds negative or infinite values"),
        ({"importance": np.array([1, 2, -3.0, 4])}, {}, "array 'importance' holds negative or infinite values"),
        ({"more": np.ones(1)}, {}, "has more in it than its arrays"),
        ({}, {"scheme": {"granularity": "rows"}}, "scheme"),
        ({}, {"colour": "red"}, "colour"),
    ],
)
def test_a_damaged_table_is_refused(
    tmp_path: Path, arrays: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    path = damaged(tmp_path / "net.mpqt", arrays, **changes)
    with pytest.raises(FormatError, match=message) as caught:
        LayerTable.load(path)
    assert str(path) in str(caught.value)


def test_weights_are_no_table(tmp_path: Path) -> None:
    save_file({"fc.weight": np.ones((2, 2), np.float32)}, tmp_path / "net.safetensors")
    assert not is_table(tmp_path / "net.safetensors")
    assert not is_table(tmp_path)
    with pytest.raises(FormatError, match="not a table"):
        LayerTable.load(tmp_path / "net.safetensors")


def test_a_truncated_table_is_refused(tmp_path: Path) -> None:
    path = damaged(tmp_path / "net.mpqt")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FormatError, match="is cut short"):
        LayerTable.load(path)


def test_tables_of_the_version_without_checksums_are_read_and_said(tmp_path: Path) -> None:
    table = measure(conv_net(), per_channel=True)
    table.save(tmp_path / "net.mpqt")
    with pytest.warns(MeasureWarning, match=naming("net.mpqt", "version", "checksums")):
        old = LayerTable.load(version_1(tmp_path / "net.mpqt"))
    assert contents(old) == contents(replace(table, rest_bytes=None))


def test_tables_of_the_version_that_knew_no_rest_are_read(tmp_path: Path) -> None:
    table = measure(conv_net(), per_channel=True)
    table.save(tmp_path / "net.mpqt")
    old = LayerTable.load(version_2(tmp_path / "net.mpqt"))
    assert contents(old) == contents(replace(table, rest_bytes=None))


def test_tables_of_the_version_without_a_ladder_are_read(tmp_path: Path) -> None:
    table = measure(conv_net(), per_channel=True)
    table.save(tmp_path / "net.mpqt")
    assert contents(LayerTable.load(version_3(tmp_path / "net.mpqt"))) == contents(table)


def test_tables_of_the_version_without_types_are_read(tmp_path: Path) -> None:
    for scheme in (Affine(granularity="per_channel"), EntropyCoded()):
        table = measure(conv_net(), scheme, per_channel=True)
        table.save(tmp_path / "net.mpqt")
        assert contents(LayerTable.load(version_4(tmp_path / "net.mpqt"))) == contents(table)


def test_a_ladder_comes_back_to_the_bit(tmp_path: Path) -> None:
    table = measure(conv_net(), EntropyCoded())
    table.save(tmp_path / "net.mpqt")
    assert contents(LayerTable.load(tmp_path / "net.mpqt")) == contents(table)
    assert table.layers[0].coded is not None


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("steps", lambda steps: steps[:, ::-1].copy(), "array 'steps' holds steps that do not ascend from above 0"),
        ("steps", lambda steps: steps - steps[:, :1], "array 'steps' holds steps that do not ascend from above 0"),
        ("coded_bits", lambda bits: -bits - 1, "array 'coded_bits' holds negative or infinite values"),
        ("coded_squared", lambda lost: lost * np.nan, "array 'coded_squared' holds NaN"),
        ("coded_bits", lambda _: None, "array 'coded_bits' should be F64"),
    ],
)
def test_a_damaged_ladder_is_refused(tmp_path: Path, name: str, change: Any, message: str) -> None:
    path = tmp_path / "net.mpqt"
    table = measure(conv_net(), EntropyCoded())
    table.save(path)
    curves = {
        "steps": [layer.coded.steps for layer in table.layers if layer.coded is not None],
        "coded_bits": [layer.coded.bits for layer in table.layers if layer.coded is not None],
        "coded_squared": [layer.coded.squared_error for layer in table.layers if layer.coded is not None],
    }
    with pytest.raises(FormatError, match=message):
        LayerTable.load(resealed(path, {name: change(np.stack(curves[name]))}))


def test_a_table_that_lost_its_checksums_is_refused(tmp_path: Path) -> None:
    path = damaged(tmp_path / "net.mpqt")
    data = path.read_bytes()
    for field in (b'\\"checksum\\"', b'\\"checksums\\"'):
        assert field in data
        path.write_bytes(data.replace(field, field.replace(b"check", b"chuck")))
        with pytest.raises(FormatError, match=r"description is damaged|chucksum"):
            LayerTable.load(path)


def test_a_table_with_a_name_that_no_file_holds_is_not_written(tmp_path: Path) -> None:
    table = measure(conv_net())
    first = replace(table.layers[0], name="a\ud800b")
    broken = replace(table, layers=(first, *table.layers[1:]))
    with pytest.raises(SettingError, match=r"table: cannot hold '\\ud800', which is no character; rename"):
        broken.save(tmp_path / "table.mpqt")
    assert not list(tmp_path.iterdir())
