"""A checkpoint in several files and its index: where they disagree, the file and the remedy are named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mpq_plugins import Uniform, compress, decompress, measure
from mpq_plugins.checkpoints.checkpoint import open_checkpoint
from mpq_plugins.checkpoints.shards import INDEX_NAME, TORCH_INDEX_NAME
from mpq_plugins.errors import SourceError
from mpq_plugins.simulation.checkpoint import rewrite
from mpq_plugins.simulation.layer import simulate_layer
from tests.conftest import Ran
from tests.helpers.checkpoints import sharded
from tests.helpers.says import naming

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def two_shards(path: Path) -> Path:
    """`a.weight` in the first and `b.weight` in the second."""
    return sharded(path, {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)})


@pytest.mark.parametrize("names", [[FIRST], [SECOND], [FIRST, SECOND]])
def test_parts_without_their_index_are_no_model(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        save_file({name: torch.ones(2, 2)}, tmp_path / name)
    with pytest.raises(SourceError, match=naming(names[0], "parts", "model.safetensors.index.json")):
        open_checkpoint(tmp_path)


def test_one_part_of_one_is_a_model(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model-00001-of-00001.safetensors")
    assert list(open_checkpoint(tmp_path)) == ["a.weight"]


def test_weights_in_an_inner_directory_are_pointed_at(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "unet" / "model.safetensors")
    with pytest.raises(SourceError, match=r"no weights there.*There are some in unet"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", [1, None, ["x"], {}])
def test_an_index_names_files_by_texts(tmp_path: Path, shard: object) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a.weight": shard}}))
    with pytest.raises(SourceError, match=naming("'a.weight'", "no file")):
        open_checkpoint(tmp_path)


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


def halves() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return {"a.weight": torch.randn(4, 4), "a.bias": torch.ones(4)}, {"b.weight": torch.randn(4, 4)}


def torch_shards(directory: Path) -> dict[str, torch.Tensor]:
    """As transformers saved models for years."""
    directory.mkdir()
    files = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    for file, own in zip(files, halves(), strict=True):
        torch.save(own, directory / file)
    weight_map = {name: file for file, own in zip(files, halves(), strict=True) for name in own}
    (directory / TORCH_INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "training_args.bin").write_bytes(b"anything")
    return {name: value for file in files for name, value in torch.load(directory / file, weights_only=True).items()}


def test_torch_shards_in_torch_shards_out(tmp_path: Path) -> None:
    state = torch_shards(tmp_path / "in")
    stored = open_checkpoint(tmp_path / "in")
    assert {name: tensor.shape for name, tensor in stored.items()} == {n: tuple(v.shape) for n, v in state.items()}
    plan = Uniform(bits=2)(measure(tmp_path / "in", bits=(2,)))
    rewrite(tmp_path / "in", plan, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in (tmp_path / "in").iterdir())
    written = {name: tensor.tensor() for name, tensor in open_checkpoint(tmp_path / "out").items()}
    assert written["a.bias"].equal(state["a.bias"])
    for layer in plan.layers:
        assert written[f"{layer.name}.weight"].equal(simulate_layer(state[f"{layer.name}.weight"], layer))
    compress(tmp_path / "in", plan, tmp_path / "x.mpq")
    assert all(value.equal(written[name]) for name, value in decompress(tmp_path / "x.mpq").items())


def test_torch_shards_that_disagree_with_their_index(tmp_path: Path) -> None:
    torch_shards(tmp_path / "in")
    torch.save({"c.weight": torch.ones(2, 2)}, tmp_path / "in" / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(SourceError, match=naming("00002.bin", "'b.weight'", "pytorch_model.bin.index.json")):
        open_checkpoint(tmp_path / "in")


@pytest.mark.parametrize(
    "name",
    ["consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "net.pth"],
)
def test_a_directorys_only_weights_are_taken_whatever_they_are_called(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"anything")
    own = halves()[0]
    if name.endswith(".safetensors"):
        save_file(own, tmp_path / name)
    else:
        torch.save(own, tmp_path / name)
    assert open_checkpoint(tmp_path)["a.weight"].tensor().equal(own["a.weight"])
    plan = Uniform(bits=2)(measure(tmp_path, bits=(2,)))
    target = tmp_path.with_name(f"{tmp_path.name}-out")
    rewrite(tmp_path, plan, target)
    assert open_checkpoint(target)["a.weight"].tensor().equal(simulate_layer(own["a.weight"], plan.layers[0]))


def test_an_index_of_a_variant_is_followed(tmp_path: Path) -> None:
    directory = two_shards(tmp_path / "model")
    (directory / INDEX_NAME).rename(directory / "diffusion_pytorch_model.safetensors.index.json")
    assert set(open_checkpoint(directory)) == {"a.weight", "b.weight"}


def test_several_files_that_may_be_meant_are_named(tmp_path: Path) -> None:
    for name in ("model.fp16.safetensors", "model.non_ema.safetensors"):
        save_file(halves()[0], tmp_path / name)
    with pytest.raises(SourceError, match=naming(2, "model.fp16.safetensors", "model.non_ema.safetensors")):
        open_checkpoint(tmp_path)


def test_a_directory_of_another_kind_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(50))
    with pytest.raises(SourceError, match=naming("no weights", "model-Q4_K_M.gguf", "GGUF")):
        open_checkpoint(tmp_path)


def test_the_command_says_which_file_it_took(tmp_path: Path, mpq: Callable[..., Ran]) -> None:
    save_file(halves()[0], tmp_path / "consolidated.safetensors")
    assert "weights: consolidated.safetensors, the only ones" in mpq("plan", tmp_path, "-a", "uniform", "--bits", 4).err
