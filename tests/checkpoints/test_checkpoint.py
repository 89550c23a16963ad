"""Files that lie, end early or would do harm: each one clear error."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpq_plugins.checkpoints.checkpoint import open_checkpoint, stored_tensors
from mpq_plugins.errors import SourceError
from tests.helpers.checkpoints import harmful
from tests.helpers.says import naming


def refused(path: Path, pattern: str) -> None:
    with pytest.raises(SourceError, match=pattern) as caught:
        open_checkpoint(path)
    assert str(path).split("/")[-1] in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.safetensors", "no such file")


def test_a_directory_without_weights(tmp_path: Path) -> None:
    refused(tmp_path, "no weights there")


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_a_truncated_safetensors(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"fc.weight": torch.ones(8, 8)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    refused(path, "truncated or not a safetensors file")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_execute_code(tmp_path: Path, legacy: bool) -> None:
    proof = tmp_path / "harm-was-done"
    refused(harmful(tmp_path / "model.pt", proof, legacy), "would execute code")
    assert not proof.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_torch_checkpoint(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save({"fc.weight": torch.ones(64, 64)}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 100):
        path.write_bytes(content[:length])
        refused(path, "not a readable torch checkpoint")


def test_text_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("hello, this is a text file\n")
    refused(path, "not a readable torch checkpoint|would execute code")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}])
def test_a_checkpoint_with_no_or_several_state_dicts(tmp_path: Path, content: object) -> None:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    refused(path, "state dict|no tensors")


def test_a_file_that_shrinks_while_being_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"fc.weight": torch.ones(8, 8)}, path)
    tensor = open_checkpoint(path)["fc.weight"]
    path.write_bytes(path.read_bytes()[:-10])
    assert tensor.read_rows(0, 2).equal(torch.ones(2, 8))
    with pytest.raises(SourceError, match=r"'fc\.weight' is cut short"):
        tensor.read_rows(0, 8)


class Kept(Tensor):
    """A tensor in another form, as quantizers have them: of no values that torch could read."""

    @staticmethod
    def __new__(cls) -> "Kept":
        return Tensor._make_wrapper_subclass(cls, (4, 4))

    @classmethod
    def __torch_dispatch__(cls, *call: Any) -> Any:
        return cls()


@pytest.mark.parametrize("parameter", [False, True])
def test_a_tensor_in_another_form_is_called_so(parameter: bool) -> None:
    kept = Kept()
    state = {"fc.weight": nn.Parameter(kept) if parameter else kept}
    with pytest.raises(SourceError, match=naming("'fc.weight'", "quantized already", "Kept")):
        stored_tensors(state)
