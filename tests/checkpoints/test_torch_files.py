"""Torch checkpoints read where their tensors lie: the same values as torch's own loading, without its memory."""

import io
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mpq_plugins import Uniform, compress, decompress, find_weights, measure
from mpq_plugins.checkpoints.checkpoint import load_lazily, open_checkpoint
from mpq_plugins.checkpoints.readers import FileRows
from mpq_plugins.errors import SourceError
from mpq_plugins.simulation.checkpoint import rewrite
from tests.helpers.says import naming


def saved(folder: Path, content: Any, **options: Any) -> Path:
    path = folder / "net.pt"
    torch.save(content, path, **options)
    return path


def rezipped(path: Path, compression: int) -> Path:
    """The same archive as another program writes it: records elsewhere, none aligned."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in reversed(archive.namelist())}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return path


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


@st.composite
def views(draw: st.DrawFn, storage: Tensor) -> Tensor:
    """Some tensor that lies in the storage, seen in whatever order, itself overlapped or not."""
    dims = draw(st.integers(0, 3))
    shape = [draw(st.integers(0, 4)) for _ in range(dims)]
    stride = [draw(st.integers(0, 5)) for _ in range(dims)]
    last = sum((side - 1) * step for side, step in zip(shape, stride, strict=True) if side) if all(shape) else 0
    offset = draw(st.integers(0, max(0, storage.numel() - 1 - last)))
    view = storage.as_strided(shape, stride, offset) if last < storage.numel() else storage[:2]
    view = torch._neg_view(view) if view.is_floating_point() and draw(st.booleans()) else view
    return nn.Parameter(view) if view.is_floating_point() and draw(st.booleans()) else view


@st.composite
def states(draw: st.DrawFn) -> dict[str, Tensor]:
    values = torch.arange(60) % 7
    storages = [values.to(draw(st.sampled_from(DTYPES))) for _ in range(draw(st.integers(1, 3)))]
    chosen = [draw(st.sampled_from(storages)) for _ in range(draw(st.integers(1, 5)))]
    return {f"t{k}": draw(views(storage)) for k, storage in enumerate(chosen)}


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(states(), st.sampled_from(["torch", "legacy", "stored", "deflated"]))
def test_it_reads_what_torch_reads(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor], how: str
) -> None:
    path = saved(tmp_path_factory.mktemp("torch"), state, _use_new_zipfile_serialization=how != "legacy")
    if how in ("stored", "deflated"):
        rezipped(path, zipfile.ZIP_STORED if how == "stored" else zipfile.ZIP_DEFLATED)
    expected = torch.load(path, weights_only=True)
    found = open_checkpoint(path)
    assert list(found) == list(expected)
    for name, own in found.items():
        assert (own.shape, own.dtype) == (tuple(expected[name].shape), expected[name].dtype)
        assert own.tensor().equal(expected[name].detach())
        if own.shape and own.tensor().numel():
            middle = own.shape[0] // 2
            rows = expected[name].detach()[middle:].reshape(own.shape[0] - middle, -1)
            assert own.read_rows(middle, own.shape[0]).equal(rows)


def test_names_of_one_storage_are_tied_and_others_are_not(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    state = {"a.weight": weight, "b.weight": weight, "c.weight": weight.t(), "d.weight": weight.clone()}
    found = find_weights(saved(tmp_path, state))
    assert [weight.names for weight in found] == [("a", "b"), ("c",), ("d",)]


def test_nothing_is_loaded_before_it_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path, {"fc.weight": torch.randn(1 << 10, 1 << 10), "fc.bias": torch.randn(1 << 10)})
    content = load_lazily(path)
    assert all(tensor.is_meta for tensor in content.values())
    assert all(isinstance(own.read_rows, FileRows) for own in open_checkpoint(path).values())


@pytest.mark.slow
def test_a_file_cut_short_while_it_is_read_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    path = saved(tmp_path, {"fc.weight": torch.randn(1 << 9, 1 << 9)})
    code = (
        "import sys, os\n"
        "from mpq_plugins.checkpoints.checkpoint import open_checkpoint\n"
        "tensor = open_checkpoint(__import__('pathlib').Path(sys.argv[1]))['fc.weight']\n"
        "os.truncate(sys.argv[1], 1000)\n"
        "try: tensor.tensor()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "SourceError" in done.stdout
    assert "'fc.weight' is cut short" in done.stdout


def test_expanded_tensors_are_refused_by_name_where_they_are_read(tmp_path: Path) -> None:
    large = torch.ones(1).expand(1 << 30, 1 << 30)
    path = saved(
        tmp_path, {"fc.weight": torch.randn(8, 4), "huge.weight": large, "mask": torch.ones(1, 1).expand(9, 9)}
    )
    message = r"net.pt: tensor 'huge.weight' has 1152921504606846976 values, and 1 are stored"
    with pytest.raises(SourceError, match=message):
        measure(path)
    plan = Uniform(bits=4)(measure(path, skip=["huge"]))
    rewrite(path, plan, tmp_path / "out.pt")  # left alone, and as small as it was
    assert (tmp_path / "out.pt").stat().st_size < 10_000
    with pytest.raises(SourceError, match=message):
        compress(path, plan, tmp_path / "out.mpq")
    assert open_checkpoint(path)["mask"].tensor().equal(torch.ones(9, 9))


def test_many_tensors_in_the_same_bytes_are_refused(tmp_path: Path) -> None:
    values = torch.randn(1 << 18)
    views = {f"{k}.weight": values[: 256 * (1000 - k)].view(1000 - k, 256) for k in range(40)}
    with pytest.raises(SourceError, match=r"net.pt: tensor '\d+.weight' lies with others in 1048576 bytes"):
        open_checkpoint(saved(tmp_path, views))
    assert len(open_checkpoint(saved(tmp_path, dict(list(views.items())[:12])))) == 12
    assert len(open_checkpoint(saved(tmp_path, {f"{k}.weight": values.view(512, 512) for k in range(99)}))) == 99


def test_a_plan_of_an_expanded_layer_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    plan = Uniform(bits=4)(measure(saved(tmp_path, {"fc.weight": torch.randn(1 << 10, 1 << 10)})))
    path = saved(tmp_path, {"fc.weight": torch.ones(1).expand(1 << 10, 1 << 10)})
    with pytest.raises(SourceError, match=naming("'fc.weight'", 1048576, 1)):
        rewrite(path, plan, tmp_path / "out.pt")
    assert list(tmp_path.iterdir()) == [path]


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"fc.weight": torch.randn(8, 4)})
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, b"}" * (1 << 26))
    with pytest.raises(SourceError, match=r"net.pt: not a readable torch checkpoint \(its .* bytes would unpack to"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: torch.empty(4, 4, device="meta"), "tensor 'fc.weight' is on the meta device and has no values"),
        (lambda: torch.eye(4).to_sparse(), "tensor 'fc.weight' is torch.sparse_coo, nested or sparse; convert it"),
        (lambda: torch.eye(4).to_sparse_csr(), "tensor 'fc.weight' is torch.sparse_csr, nested or sparse; convert it"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_has_no_values_of_its_own_is_refused_by_name(
    tmp_path: Path, made: Callable[[], Tensor], message: str
) -> None:
    with pytest.raises(SourceError, match=f"net.pt: {message}"):
        open_checkpoint(saved(tmp_path, {"a": torch.ones(1), "fc.weight": made()}))


def test_names_that_are_no_text_are_refused_and_keys_that_are_no_names_left_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=naming("net.pt", r"'fc\ud800.weight'", "rename")):
        open_checkpoint(saved(tmp_path, {"fc\ud800.weight": torch.ones(2, 2)}))
    path = saved(tmp_path, {"fc.weight": torch.randn(4, 4), 0: torch.ones(2), None: 3, (1, 2): "x"})
    assert list(open_checkpoint(path)) == ["fc.weight"]
    plan = Uniform(bits=4)(measure(path))
    rewrite(path, plan, tmp_path / "out.pt")
    assert list(torch.load(tmp_path / "out.pt", weights_only=True)) == ["fc.weight", 0, None, (1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is left out
        container = compress(path, plan, tmp_path / "net.mpq")
    assert container.header.left_out == ("0", "None", "(1, 2)")
    expected = torch.load(tmp_path / "out.pt", weights_only=True)["fc.weight"]
    assert decompress(tmp_path / "net.mpq")["fc.weight"].equal(expected)


def test_pipes_and_devices_are_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "net.pt")
    os.mkfifo(tmp_path / "net.safetensors")
    for path in (tmp_path / "net.pt", tmp_path / "net.safetensors", Path("/dev/zero")):
        with pytest.raises(SourceError, match="it is no ordinary file"):
            open_checkpoint(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_checkpoint_is_our_error_or_has_tensors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"fc.weight": torch.ones(3, 2)}, "epoch": 3}, buffer)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "net.pt"
    path.write_bytes(content)
    try:
        for own in open_checkpoint(path).values():
            own.tensor()
    except SourceError:
        pass
