"""Tables of types on disk: the same again, or an error naming the file."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from mpq_plugins import FormatError, SettingError, TypeTable, measure, measure_types
from mpq_plugins.plans.type_table import is_type_table
from tests.helpers.tables import contents


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))


def table() -> TypeTable:
    return measure_types(net(), ("mxfp4", "mxfp6_e3m2", "fp8_e4m3"))


def test_a_table_is_the_same_again_and_so_are_its_bytes(tmp_path: Path) -> None:
    made = table()
    made.save(tmp_path / "a.mpqt")
    read = TypeTable.load(tmp_path / "a.mpqt")
    assert contents(read) == contents(made)
    read.save(tmp_path / "b.mpqt")
    assert (tmp_path / "a.mpqt").read_bytes() == (tmp_path / "b.mpqt").read_bytes()
    assert is_type_table(tmp_path / "a.mpqt")


def test_a_layer_has_the_types_that_its_shape_can_take() -> None:
    made = table()
    assert made.types_for("0") == ("mxfp4", "mxfp6_e3m2", "fp8_e4m3")
    assert made.types_for("1") == ("fp8_e4m3",)
    with pytest.raises(SettingError, match="type: 'int4' was not measured; this table has mxfp4, mxfp6_e3m2, fp8_e4m3"):
        made.column("int4")


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.mpqt"
    table().save(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with pytest.raises(FormatError, match=r"t\.mpqt"):
            TypeTable.load(path)
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"t\.mpqt"):
            TypeTable.load(path)


def test_columns_of_other_weights_or_types_are_refused(tmp_path: Path) -> None:
    table().save(tmp_path / "a.mpqt")
    other = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))
    measure_types(other, ("mxfp4", "mxfp6_e3m2", "fp8_e4m3")).save(tmp_path / "b.mpqt")
    arrays, others = load_file(tmp_path / "a.mpqt"), load_file(tmp_path / "b.mpqt")
    with safe_open(tmp_path / "a.mpqt", "numpy") as file:
        metadata = file.metadata()
    save_file({**arrays, "type.0": others["type.0"]}, tmp_path / "c.mpqt", metadata)
    with pytest.raises(FormatError, match="layer '0' of type 'mxfp4' is of other weights"):
        TypeTable.load(tmp_path / "c.mpqt")
    save_file({**arrays, "type.0": arrays["type.1"], "type.1": arrays["type.0"]}, tmp_path / "c.mpqt", metadata)
    with pytest.raises(FormatError, match="type 'mxfp4' was measured as another"):
        TypeTable.load(tmp_path / "c.mpqt")
    save_file({name: value for name, value in arrays.items() if name != "type.2"}, tmp_path / "c.mpqt", metadata)
    with pytest.raises(FormatError, match="holds other tables than it says"):
        TypeTable.load(tmp_path / "c.mpqt")


def test_a_plain_table_is_no_table_of_types(tmp_path: Path) -> None:
    measure(net(), bits=(4,)).save(tmp_path / "t.mpqt")
    assert not is_type_table(tmp_path / "t.mpqt")
    with pytest.raises(FormatError, match="not a table of types"):
        TypeTable.load(tmp_path / "t.mpqt")
