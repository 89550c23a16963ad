"""Damaged tables: each an error naming the file and what is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mpq_plugins import LayerTable, measure
from mpq_plugins.errors import FormatError
from mpq_plugins.table import is_table
from tests.nets import conv_net


def damaged(path: Path, arrays: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A table with arrays replaced (None removes one) and fields of its description changed."""
    measure(conv_net(), per_channel=True).save(path)
    with safe_open(path, "numpy") as file:
        found = {name: file.get_tensor(name) for name in sorted(file.keys())}
        metadata = dict(file.metadata())
    found = {name: array for name, array in (found | (arrays or {})).items() if array is not None}
    description = json.loads(metadata["table"])
    for key, value in changes.items():
        if key in description:
            description[key] = value
        else:
            description["layers"][0][key] = value
    save_file(found, path, metadata | {"table": json.dumps(description)})
    return path


@pytest.mark.parametrize(
    ("arrays", "changes", "message"),
    [
        ({"errors": None}, {}, "array 'errors' should be float64 .* got nothing"),
        ({"errors": np.zeros((4, 2, 7), np.int8)}, {}, "got int8"),
        ({"importance": np.array([1, 2, np.nan, 4.0])}, {}, "with NaN"),
        ({"channel_errors": np.zeros((1, 1, 1))}, {}, "array 'channel_errors'"),
        ({}, {"version": 2}, "table version 2"),
        ({}, {"shape": []}, r"layers\[0\]\.shape"),
        ({}, {"shape": [-8, 3, 3, 3]}, r"layers\[0\]\.shape\[0\]"),
        ({}, {"channel_axis": 7}, r"layers\[0\]\.channel_axis"),
        ({}, {"name": "conv2"}, "a layer appears twice"),
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
    with pytest.raises(FormatError, match="not a readable table"):
        LayerTable.load(path)
