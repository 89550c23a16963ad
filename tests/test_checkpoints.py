"""Files that lie, end early or would do harm: each one clear error."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpq_plugins.checkpoints import open_checkpoint
from mpq_plugins.errors import SourceError
from mpq_plugins.shards import INDEX_NAME
from tests.checkpoints import harmful, sharded


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


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/elsewhere.safetensors", "a/../../b.safetensors"])
def test_an_index_naming_a_shard_outside_its_directory(tmp_path: Path, shard: str) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / "elsewhere.safetensors")
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": {"fc.weight": shard}}))
    with pytest.raises(SourceError, match="outside its directory"):
        open_checkpoint(directory)


def test_an_index_naming_a_missing_shard(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "model", {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)})
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match="there is no such file"):
        open_checkpoint(directory)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', "\x00"])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(SourceError, match="not a safetensors index"):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks_while_being_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"fc.weight": torch.ones(8, 8)}, path)
    tensor = open_checkpoint(path)["fc.weight"]
    path.write_bytes(path.read_bytes()[:-10])
    assert tensor.read_rows(0, 2).equal(torch.ones(2, 8))
    with pytest.raises(SourceError, match=r"'fc\.weight' is cut short"):
        tensor.read_rows(0, 8)


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "model", {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)})
    save_file(
        {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)}, directory / "model-00002-of-00002.safetensors"
    )
    with pytest.raises(SourceError, match=r"00002-of-00002.*'a\.weight'.*00001-of-00002.*merge"):
        open_checkpoint(directory)


def test_a_tensor_that_the_index_does_not_know(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "model", {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)})
    save_file(
        {"b.weight": torch.ones(2, 2), "c.weight": torch.ones(2, 2)}, directory / "model-00002-of-00002.safetensors"
    )
    with pytest.raises(SourceError, match=r"'c\.weight', of which .*index.* knows nothing .*fetch them again"):
        open_checkpoint(directory)


def test_an_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"a.weight": "a.safetensors", "a.weight": "b.safetensors"}}')
    with pytest.raises(SourceError, match=r"'a\.weight' appears twice"):
        open_checkpoint(tmp_path)


def test_an_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "model", {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)})
    index = json.loads((directory / INDEX_NAME).read_text())
    names = list(index["weight_map"].values())
    index["weight_map"] = dict(zip(index["weight_map"], reversed(names), strict=True))
    (directory / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"lacks tensor .* it is in model-0000"):
        open_checkpoint(directory)
