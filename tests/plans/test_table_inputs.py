"""What a table's file says of inputs: back to the bit, the same bytes as ever where there is none, damage refused."""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from mpq_plugins import Activations, InputStats, LayerTable, TypeColumn, TypeTable, named_type
from mpq_plugins.errors import FormatError, SettingError
from tests.helpers.says import naming
from tests.helpers.tables import contents, resealed, table

NAMES = ("stem", "left", "right", "head")
FINITE = st.floats(0, 1e300)
HOW = st.one_of(
    st.builds(Activations, st.integers(2, 16), st.booleans(), range=st.sampled_from(["mse", "minmax", "kl"])),
    st.builds(Activations, st.integers(2, 16), st.booleans(), st.sampled_from(["per_tensor", "per_token"])),
    st.builds(Activations, st.integers(2, 16), range=st.just("percentile"), share=st.floats(0.6, 1)),
)


def bare() -> LayerTable:
    return table({name: [0.5**b for b in range(8)] for name in NAMES})


def with_inputs(**changes: Any) -> LayerTable:
    """Inputs of all layers but the first; two of them read one tensor."""
    tensors = {"left": "left", "right": "left", "head": "head"}
    inputs = {
        name: InputStats(
            10 + k, tensor, {"relative": np.array([0.5, 0.1 * k]), "mse": np.array([3.0, k])},
            {"kl": np.array([1.0, 0.25 * k])},
        )
        for k, (name, tensor) in enumerate(tensors.items())
    }  # fmt: skip
    layers = tuple(replace(layer, inputs=inputs.get(layer.name)) for layer in bare().layers)
    fields = {"activations": Activations(8), "input_bits": (4, 8), "live": (("left", "head"),), **changes}
    return replace(bare(), layers=layers, **fields)


@st.composite
def tables(draw: st.DrawFn) -> LayerTable:
    bits = tuple(sorted(draw(st.sets(st.integers(2, 16), min_size=1))))
    metrics = draw(st.lists(st.sampled_from(["relative", "mse", "max_abs"]), unique=True))
    costs = draw(st.lists(st.sampled_from(["kl", "output_mse", "another"]), unique=True))
    held = draw(st.lists(st.sampled_from(NAMES), unique=True))

    def curves(names: list[str]) -> dict[str, Any]:
        values = st.lists(FINITE, min_size=len(bits), max_size=len(bits))
        return {name: np.array(draw(values), np.float64) for name in names}

    inputs = {
        name: InputStats(draw(st.integers(1, 1 << 60)), draw(st.sampled_from(held)), curves(metrics), curves(costs))
        for name in held
    }
    tensors = sorted({own.tensor for own in inputs.values()})
    live = draw(st.lists(st.lists(st.sampled_from(tensors), min_size=1, unique=True).map(tuple))) if tensors else []
    layers = tuple(replace(layer, inputs=inputs.get(layer.name)) for layer in bare().layers)
    return replace(bare(), layers=layers, activations=draw(HOW), input_bits=bits, live=tuple(live))


@given(tables())
def test_inputs_come_back_to_the_bit(made: LayerTable) -> None:
    with TemporaryDirectory() as folder:
        path, again = Path(folder) / "net.mpqt", Path(folder) / "again.mpqt"
        made.save(path)
        read = LayerTable.load(path)
        assert contents(read) == contents(made)
        read.save(again)
        assert path.read_bytes() == again.read_bytes()


def test_a_table_without_inputs_says_nothing_of_them(tmp_path: Path) -> None:
    path = tmp_path / "net.mpqt"
    bare().save(path)
    with safe_open(path, "numpy") as file:
        assert sorted(file.keys()) == ["channel_importance", "errors", "importance"]
        assert "inputs" not in json.loads(file.metadata()["table"])
    read = LayerTable.load(path)
    assert (read.activations, read.input_bits, read.live) == (None, (), ())


def test_inputs_without_a_word_on_how_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=naming("activations", "none")):
        with_inputs(activations=None).save(tmp_path / "net.mpqt")
    with pytest.raises(SettingError, match=naming("live", "right", "no tensor")):
        with_inputs(live=(("right",),)).save(tmp_path / "net.mpqt")
    assert not list(tmp_path.iterdir())


def test_a_table_of_types_keeps_them(tmp_path: Path) -> None:
    kind = named_type("int8")
    column = replace(bare(), scheme=kind.scheme, bits=(8,), layers=tuple(
        replace(layer, errors={"relative": layer.errors["relative"][7:]}) for layer in bare().layers
    ))  # fmt: skip
    made = TypeTable(with_inputs(), (TypeColumn(kind, column),))
    made.save(tmp_path / "net.mpqt")
    assert contents(TypeTable.load(tmp_path / "net.mpqt").base) == contents(with_inputs())


def document(path: Path) -> dict[str, Any]:
    with safe_open(path, "numpy") as file:
        described: dict[str, Any] = json.loads(file.metadata()["table"])["inputs"]
    return described


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": [8, 4]}, r"inputs\.?.*bits: \[8, 4\] is not allowed; some of 2 to 16"),
        ({"bits": [1, 8]}, r"bits: \[1, 8\] is not allowed"),
        ({"bits": []}, "bits"),
        ({"metrics": ["mse", "mse"]}, "metrics: .* has one twice"),
        ({"metrics": ["mse", "colour"]}, "metrics: 'colour' is not allowed"),
        ({"sensitivities": ["kl", "kl"]}, "sensitivities: .* has one twice"),
        ({"live": [["left", "left"]]}, "live: .* holds one twice"),
        ({"live": [["right"]]}, "what is no tensor"),
        ({"live": [[]]}, "live"),
        ({"activations": {"bits": 1}}, "activations"),
        ({"activations": {"bits": 8, "range": "colour"}}, "colour"),
        ({"activations": None}, "activations"),
        ({"colour": "red"}, "colour"),
        ({"layers": []}, "live|has checksums of other arrays"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "net.mpqt"
    with_inputs().save(path)
    resealed(path, inputs={**document(path), **change})
    with pytest.raises(FormatError, match=message) as caught:
        LayerTable.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numel": 0}, "numel"),
        ({"numel": "10"}, "numel"),
        ({"tensor": "stem"}, "'stem' is named as a tensor, and is no layer with an input"),
        ({"name": "other"}, "named as a tensor|inputs: its layers are not the table's"),
        ({"name": "right"}, "has one twice"),
    ],
)
def test_a_damaged_layer_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "net.mpqt"
    with_inputs().save(path)
    described = document(path)
    described["layers"][0].update(change)
    resealed(path, inputs=described)
    with pytest.raises(FormatError, match=message):
        LayerTable.load(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input_errors": None}, "array 'input_errors' should be F64 .* got nothing"),
        ({"input_errors": np.ones((3, 2, 3))}, r"array 'input_errors' should be F64 \[3, 2, 2\]"),
        ({"input_errors": np.full((3, 2, 2), -1.0)}, "array 'input_errors' holds negative or infinite"),
        ({"input_errors": np.full((3, 2, 2), np.inf)}, "array 'input_errors' holds negative or infinite"),
        ({"input_errors": np.full((3, 2, 2), np.nan)}, "array 'input_errors' holds NaN"),
        ({"input_sensitivities": np.full((3, 1, 2), np.inf)}, "array 'input_sensitivities' holds infinity"),
        ({"input_sensitivities": None}, "array 'input_sensitivities' should be F64"),
        ({"more": np.ones(1)}, "has more in it than its arrays|does not lie where it should"),
    ],
)
def test_damaged_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = tmp_path / "net.mpqt"
    with_inputs().save(path)
    with pytest.raises(FormatError, match=message):
        LayerTable.load(resealed(path, arrays))


def test_flipped_bits_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "net.mpqt"
    with_inputs().save(path)
    whole = path.read_bytes()
    for place in range(len(whole) - 40, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(FormatError):
            LayerTable.load(path)
    path.write_bytes(whole[:-8])
    with pytest.raises(FormatError, match="cut short"):
        LayerTable.load(path)
