"""Chunks are the weight, whoever reads them ahead, in whatever dtype and memory."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mpq_plugins import Affine, Piecewise, measure
from mpq_plugins.checkpoints.readers import FileRows
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.plans.stats import METRICS
from mpq_plugins.weights import chunks
from mpq_plugins.weights.find import find_weights
from mpq_plugins.weights.handles import Weight

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def weights_in(path: Path, tensors: dict[str, Tensor]) -> list[Weight]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return list(find_weights(path))


@given(
    st.integers(2, 40), st.integers(2, 9), st.integers(1, 60),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_chunks_in_turn_are_the_rows_of_the_weight(
    tmp_path_factory: pytest.TempPathFactory,
    channels: int,
    inputs: int,
    chunk: int,
    dtype: torch.dtype,
    transposed: bool,
    waiting: bool,
) -> None:
    tensor = torch.randn(2, channels, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    state = {"experts.down_proj": tensor.mT if transposed else tensor, "embed_tokens.weight": torch.ones(2, 99)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", chunk)
        patch.setattr("mpq_plugins.weights.from_checkpoint.inputs_first", lambda *_: transposed)
        if waiting:
            patch.setattr(FileRows, "at_once", lambda *_: None)
        path = tmp_path_factory.mktemp("chunks") / "model.safetensors"
        own = [weight for weight in weights_in(path, state) if "experts" in weight.name]
        parts = [part for weight in own for part in chunks.chunks(weight)]
        assert all(
            stop - start == 1 or (stop - start) * inputs <= chunk for weight, start, stop in parts if weight in own
        )
        read = [rows.clone() for rows in chunks.read(parts)]
        for rows in read:
            assert rows.is_contiguous()
            assert rows.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        assert torch.cat([rows.double() for rows in read]).equal(tensor.double().flatten(0, 1))
        on_device = [rows.double().clone() for rows in chunks.read(parts, CPU)]
        assert torch.cat(on_device).equal(tensor.double().flatten(0, 1))


def test_an_empty_weight_is_one_empty_chunk(tmp_path: Path) -> None:
    (weight,) = weights_in(tmp_path / "model.safetensors", {"fc.weight": torch.ones(0, 4)})
    (part,) = chunks.chunks(weight)
    assert part == (weight, 0, 0)
    (rows,) = chunks.read([part])
    assert rows.shape == (0, 4)


def test_an_empty_weight_may_come_first(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(0, 4), "b.weight": torch.randn(3, 4), "c.weight": torch.ones(4, 0)}
    weights = weights_in(tmp_path / "model.safetensors", state)
    with ThreadPoolExecutor(1) as fresh:  # a thread that has no buffers yet
        table = measure(tmp_path / "model.safetensors", bits=(4,), executor=fresh)
    assert [layer.numel for layer in table.layers] == [weight.numel for weight in weights]
    assert table.error(table.layers[0], "mse", 4) == 0


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 500), st.data())
def test_a_part_that_starts_with_a_chunk_has_the_same_chunks(
    channels: int, inputs: int, chunk: int, data: st.DataObject
) -> None:
    (weight,) = find_weights(torch.nn.Linear(inputs, channels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", chunk)
        every = [(start, stop) for _, start, stop in chunks.chunks(weight)]
        assert [start for start, _ in every] == [0, *(stop for _, stop in every[:-1])]
        assert every[-1][1] == channels
        first = data.draw(st.integers(0, len(every) - 1))
        last = data.draw(st.integers(first, len(every) - 1))
        offset = every[first][0]
        part = weight.cut(offset, every[last][1])
        found = [(start + offset, stop + offset) for _, start, stop in chunks.chunks(part)]
        assert found == every[first : last + 1]


def test_the_disk_is_read_by_another_thread_one_chunk_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(chunks, "CHUNK", 8)
    monkeypatch.setattr(FileRows, "at_once", lambda *_: None)
    (weight,) = weights_in(tmp_path / "model.safetensors", {"fc.weight": torch.arange(48.0).view(12, 4)})
    by: list[str] = []
    ahead = threading.Event()
    plain = FileRows.__call__

    def watched(self: FileRows, start: int, *rest: object) -> Tensor:
        by.append(threading.current_thread().name)
        if start == 2:
            ahead.set()
        return plain(self, start, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(FileRows, "__call__", watched)
    reading = chunks.read(chunks.chunks(weight))
    first = next(reading)
    assert ahead.wait(5)  # the second chunk is asked for while the first is worked at
    assert first.flatten().tolist() == list(range(8))  # and goes elsewhere
    assert [rows.flatten().tolist() for rows in reading] == [list(range(n, n + 8)) for n in range(8, 48, 8)]
    assert len(by) == 6
    assert all(name.startswith("mpq-read") for name in by)


@pytest.mark.parametrize("scheme", [
    Affine(), Affine(granularity="per_channel", range="mse"), Affine(granularity="per_group", group_size=8),
    Piecewise(granularity="per_channel"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_device_gives_what_the_compiled_kernel_gives(
    tmp_path: Path, scheme: Scheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.randn(40, 64, generator=draw).to(dtype)}, path)
    plain = measure(path, scheme, (2, 4, 8), METRICS, per_channel=True)
    on_cpu = measure(path, scheme, (2, 4, 8), METRICS, per_channel=True, device="cpu")
    monkeypatch.setattr("mpq_plugins.quantization.kernel.numba_available", lambda: False)
    in_torch = measure(path, scheme, (2, 4, 8), METRICS, per_channel=True, device="cpu")
    assert plain.fingerprint == on_cpu.fingerprint == in_torch.fingerprint
    for other in (on_cpu, in_torch):
        for metric in METRICS:
            np.testing.assert_allclose(other.layers[0].errors[metric], plain.layers[0].errors[metric], rtol=1e-5)
            np.testing.assert_allclose(
                other.layers[0].channel_errors[metric], plain.layers[0].channel_errors[metric], rtol=1e-5
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", [Affine(), Affine(granularity="per_channel"), Piecewise()], ids=str)
def test_half_precision_has_the_errors_of_the_same_floats(tmp_path: Path, scheme: Scheme, dtype: torch.dtype) -> None:
    tensor = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"a.weight": tensor}, tmp_path / "half.safetensors")
    save_file({"a.weight": tensor.float()}, tmp_path / "float.safetensors")
    half, plain = (measure(tmp_path / f"{name}.safetensors", scheme, (2, 8), METRICS) for name in ("half", "float"))
    assert half.fingerprint == plain.fingerprint
    for metric in METRICS:
        np.testing.assert_array_equal(half.layers[0].errors[metric], plain.layers[0].errors[metric])


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta", 3.5])
def test_a_device_that_cannot_compute_is_refused(device: object) -> None:
    with pytest.raises(SettingError, match=r"device: .* cannot be used .*'cpu', or 'cuda' where there is one"):
        measure(torch.nn.Linear(2, 2), device=device)  # type: ignore[arg-type]
