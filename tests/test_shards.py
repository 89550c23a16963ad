"""A checkpoint in several files and its index: where they disagree, the file and the remedy are named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mpq_plugins.checkpoints import open_checkpoint
from mpq_plugins.errors import SourceError
from mpq_plugins.shards import INDEX_NAME
from tests.checkpoints import sharded
from tests.conftest import Ran

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def two_shards(path: Path) -> Path:
    """`a.weight` in the first and `b.weight` in the second."""
    return sharded(path, {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)})


def lose_a_shard(directory: Path) -> None:
    (directory / SECOND).unlink()


def cut_a_shard_short(directory: Path) -> None:
    (directory / SECOND).write_bytes((directory / SECOND).read_bytes()[:-3])


def hold_a_tensor_twice(directory: Path) -> None:
    save_file({name: torch.ones(2, 2) for name in ("a.weight", "b.weight")}, directory / SECOND)


def hold_a_tensor_the_index_lacks(directory: Path) -> None:
    save_file({name: torch.ones(2, 2) for name in ("b.weight", "c.weight")}, directory / SECOND)


def name_a_tensor_no_shard_has(directory: Path) -> None:
    change_index(directory, {"c.weight": SECOND})


def name_the_wrong_shards(directory: Path) -> None:
    change_index(directory, {"a.weight": SECOND, "b.weight": FIRST})


def change_index(directory: Path, changes: dict[str, str]) -> None:
    index = json.loads((directory / INDEX_NAME).read_text())
    index["weight_map"] |= changes
    (directory / INDEX_NAME).write_text(json.dumps(index))


HARMS: list[tuple[Callable[[Path], None], str]] = [
    (lose_a_shard, rf"'b\.weight' is mapped to '{SECOND}', and there is no such file; 1 of 2 shards .*: fetch them"),
    (cut_a_shard_short, rf"{SECOND}: truncated or not a safetensors file .*fetch or write it again"),
    (hold_a_tensor_twice, rf"{SECOND}: holds tensor 'a\.weight', and so does {FIRST}; .*Keep one of them, or merge"),
    (hold_a_tensor_the_index_lacks, rf"{SECOND}: holds tensor 'c\.weight', of which .* knows nothing .*fetch them"),
    (name_a_tensor_no_shard_has, rf"{SECOND}: lacks tensor 'c\.weight', which .* puts there\. .*fetch them again"),
    (name_the_wrong_shards, rf"{SECOND}: lacks tensor 'a\.weight', .*it is in {FIRST}\. .*fetch them again"),
]


@pytest.mark.parametrize(("harm", "message"), HARMS, ids=lambda value: getattr(value, "__name__", ""))
def test_shards_that_disagree_with_their_index(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    directory = two_shards(tmp_path / "model")
    open_checkpoint(directory)
    harm(directory)
    with pytest.raises(SourceError, match=message) as caught:
        open_checkpoint(directory)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize(("harm", "message"), HARMS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_command_says_it_in_one_line_and_writes_nothing(
    tmp_path: Path, harm: Callable[[Path], None], message: str, mpq: Callable[..., Ran]
) -> None:
    directory = two_shards(tmp_path / "model")
    harm(directory)
    before = sorted(tmp_path.rglob("*"))
    ran = mpq("measure", directory, "-o", tmp_path / "model.mpqt")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert str(directory) in ran.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/elsewhere.safetensors", "a/../../b.safetensors"])
def test_an_index_naming_a_shard_outside_its_directory(tmp_path: Path, shard: str) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / "elsewhere.safetensors")
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": {"fc.weight": shard}}))
    with pytest.raises(SourceError, match="outside its directory"):
        open_checkpoint(directory)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', "\x00", "[" * 100_000])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(SourceError, match="not a safetensors index"):
        open_checkpoint(tmp_path)


def test_an_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"a.weight": "a.safetensors", "a.weight": "b.safetensors"}}')
    with pytest.raises(SourceError, match=r"'a\.weight' appears twice"):
        open_checkpoint(tmp_path)


@given(
    st.lists(st.sets(st.sampled_from("abcde")), min_size=1, max_size=3),
    st.dictionaries(st.sampled_from("abcde"), st.integers(0, 2)),
)
def test_a_checkpoint_is_read_exactly_where_index_and_shards_agree(
    tmp_path_factory: pytest.TempPathFactory, held: list[set[str]], index: dict[str, int]
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    for number, names in enumerate(held):
        tensors = {name: torch.full((2, 2), float(10 * number + ord(name))) for name in sorted(names)}
        save_file(tensors, directory / f"{number}.safetensors")
    weight_map = {name: f"{number}.safetensors" for name, number in index.items()}
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    named = [{name for name, own in index.items() if own == number} for number in range(3)]
    # A file that the index never names is none of its shards.
    agree = all(own == (held[number] if number < len(held) else None) for number, own in enumerate(named) if own)
    if not agree:
        with pytest.raises(SourceError, match=str(directory)):
            open_checkpoint(directory)
        return
    found = open_checkpoint(directory)
    assert sorted(found) == sorted(index)
    for name, number in index.items():
        assert found[name].read_rows(0, 2).equal(load_file(directory / f"{number}.safetensors")[name])
