"""What a file is that is no checkpoint: named by how it begins, in one sentence without torch's own."""

import argparse
import datetime
import fractions
import io
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from mpq_plugins.checkpoints.checkpoint import open_checkpoint
from mpq_plugins.checkpoints.file_kinds import of_quantizers, other_kind, pickled_objects
from mpq_plugins.errors import SourceError
from tests.helpers.says import naming

STATE = {"fc.weight": torch.randn(4, 4)}


def instance(module: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """Of a class QTensor of a module that need not be installed."""
    made = type("QTensor", (), {"__module__": module, "__qualname__": "QTensor"})
    known = types.ModuleType(module)
    known.QTensor = made  # type: ignore[attr-defined]
    for end in (at for at, letter in enumerate(module) if letter == "."):
        monkeypatch.setitem(sys.modules, module[:end], types.ModuleType(module[:end]))
    monkeypatch.setitem(sys.modules, module, known)
    return made()


def zipped(**files: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()


def torch_bytes(content: Any) -> bytes:
    made = io.BytesIO()
    torch.save(content, made)
    return made.getvalue()


def scripted() -> bytes:
    made = io.BytesIO()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), made)
    return made.getvalue()


FILES: list[tuple[str, bytes, str]] = [
    ("x.gguf", b"GGUF" + bytes(99), "a GGUF file"),
    ("x.bin", b"GGUF" + bytes(99), "a GGUF file"),
    ("x.safetensors", b"GGUF" + bytes(99), "a GGUF file"),
    ("ggml.bin", b"lmgg"[::-1] + bytes(99), "a GGML file"),
    ("x.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    ("x.npy", b"\x93NUMPY\x01\x00" + bytes(99), "a NumPy array"),
    ("x.npz", zipped(**{"a.npy": b"", "b.npy": b""}), "an archive of NumPy arrays"),
    ("x.keras", zipped(**{"config.json": b"{}", "model.weights.h5": b""}), "a Keras model"),
    ("x.zip", zipped(**{"readme.txt": b""}), "a zip archive, and no torch checkpoint"),
    ("x.pt2", zipped(**{"x/archive_format": b"pt2"}), "an exported program"),
    ("x.pt.gz", b"\x1f\x8b\x08" + bytes(99), "a gzip archive"),
    ("x.tflite", bytes(4) + b"TFL3" + bytes(99), "a TensorFlow Lite model"),
    ("x.onnx", b"\x08\x07" + bytes(99), "an ONNX model"),
    ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    ("x.pt", b"\n <!DOCTYPE html><html>", "a web page"),
    ("x.safetensors", b"\xef\xbb\xbf<!-- log in --><html>", "a web page"),
    ("x.pt", b"<html>" + "\u00e9".encode() * 300, "a web page"),  # whose 512 bytes end within a letter
    ("x.safetensors", b"<?xml version='1.0'?><Error/>", "an XML document"),
    ("x.bin", b'{"error": "not found"}', "a JSON document"),
    ("x.pt", b"404: Not Found\n", "a text"),
    ("x.safetensors", bytes(4096), "zeros"),
    ("x.pt", bytes(4096), "zeros"),
    ("x.pt", b"w".ljust(257, b"\0") + b"ustar\x0000" + bytes(300), "a tar archive"),
    ("x.pt", b"%PDF-1.7\n" + bytes(9), "a PDF document"),
    ("x.pt", b"\x08\x07\x12\x07pytorch", "no torch checkpoint, for it begins with"),
    ("flax_model.msgpack", b"\x82\xa6params", "a Flax checkpoint"),
    ("x.bin", save(STATE), "a safetensors file under another name"),
    ("x.safetensors", torch_bytes(STATE), "a torch checkpoint under another name"),
    ("x.safetensors", pickle.dumps([1, 2]), "a pickle under another name"),
]


@pytest.mark.parametrize(("name", "content", "what"), FILES, ids=[f"{own[0]}-{own[2]}" for own in FILES])
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=f"{name}: is {what}") as caught:
        open_checkpoint(tmp_path / name)
    assert "weights_only" not in str(caught.value)


def test_a_torchscript_archive_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(scripted())
    with pytest.raises(SourceError, match=naming("x.pt", "TorchScript", "torch.jit.load")) as caught:
        open_checkpoint(tmp_path / "x.pt")
    assert "weights_only" not in str(caught.value)


def test_an_archive_that_was_cut_short_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(torch_bytes(STATE)[:-200])
    with pytest.raises(SourceError, match=naming("x.pt", "without its end")):
        open_checkpoint(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(SourceError, match=naming("x.pt", "empty")):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("module", ["torchao.quantization.linear", "bitsandbytes.nn.modules", "optimum.quanto.tensor"])
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_that_another_library_quantized_are_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, legacy: bool
) -> None:
    path = tmp_path / "x.pt"
    torch.save({"fc.weight": instance(module, monkeypatch)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(SourceError, match=naming("x.pt", "quantized already", f"{module}.QTensor")) as caught:
        open_checkpoint(path)
    assert "in floating point" in str(caught.value)


@pytest.mark.parametrize(("name", "quantized"), [
    ("torchao.quantization.x.Q", True), ("optimum.quanto.tensor.Q", True), ("torch.ao.nn.quantized.Linear", True),
    ("torchao.optim.subclass_8bit.OptimState8bit", False), ("bitsandbytes.optim.Adam8bit", False),
    ("argparse.Namespace", False), ("my.torchao.Thing", False),
])  # fmt: skip
def test_which_objects_are_quantized_weights(name: str, quantized: bool) -> None:
    assert of_quantizers(["a.b", name]) == [name] * quantized


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("value", "name"), [
    (argparse.Namespace(lr=1), "argparse.Namespace"),
    (datetime.date(2000, 1, 1), "datetime.date"),
    (fractions.Fraction(1, 3), "fractions.Fraction"),
    (np.float64(1), "multiarray.scalar"),
    (Path("/"), "pathlib.PosixPath"),
    (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
], ids=range(6))  # fmt: skip
def test_what_a_pickle_would_build_is_named(tmp_path: Path, value: Any, name: str, legacy: bool) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": STATE, "extra": value}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(SourceError, match=naming("refused", "model.state_dict()")) as caught:
        open_checkpoint(path)
    assert name in str(caught.value)
    assert "trust the source" not in str(caught.value)
    assert "OrderedDict" not in str(caught.value)


def test_a_plain_state_dict_names_nothing_else(tmp_path: Path) -> None:
    every = {str(dtype): torch.ones(2).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.bool)}
    torch.save(nn.Linear(2, 2).state_dict() | every | {"p": nn.Parameter(torch.ones(2))}, tmp_path / "x.pt")
    assert pickled_objects(tmp_path / "x.pt", "") == []
    assert other_kind(tmp_path / "x.pt") is None


@given(st.binary(max_size=64), st.sampled_from(["pt", "safetensors", "bin", "onnx"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    path = tmp_path_factory.mktemp("any") / f"x.{suffix}"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"x\."):
        open_checkpoint(path)


@pytest.mark.parametrize("length", [0x685A42, 0x80, 0x480, 0x8B1F])
def test_a_safetensors_file_may_begin_with_any_length(tmp_path: Path, length: int) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    now = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + now] + b" " * (length - now)
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + header + content[8 + now :])
    assert open_checkpoint(tmp_path / "x.safetensors")["fc.weight"].tensor().equal(STATE["fc.weight"])
