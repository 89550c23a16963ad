"""Experts one below the other in a matrix, as DBRX has them: read, planned, written and packed one by one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpq_plugins import Affine, Plan, Uniform, compress, decompress, find_weights, measure
from mpq_plugins.checkpoints.checkpoint import open_checkpoint
from mpq_plugins.checkpoints.joined import with_stacks
from mpq_plugins.simulation.checkpoint import rewrite
from mpq_plugins.simulation.layer import simulate_layer
from mpq_plugins.simulation.match import match
from tests.helpers.checkpoints import sharded

EXPERTS, HIDDEN = 3, 8
BLOCK = "transformer.blocks.0.ffn"
PER_CHANNEL = Affine(granularity="per_channel")


def dbrx(inner: int = 12, router: int | None = EXPERTS) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    rows = EXPERTS * inner
    state = {f"{BLOCK}.experts.mlp.{name}": torch.randn(rows, HIDDEN, generator=draw) for name in ("v1", "w1", "w2")}
    state["transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight"] = torch.randn(24, HIDDEN, generator=draw)
    if router is not None:
        state[f"{BLOCK}.router.layer.weight"] = torch.randn(router, HIDDEN, generator=draw)
    return state


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix:
        torch.save(state, path)
    else:
        sharded(path, state)
    return path


FORMATS = pytest.mark.parametrize("name", ["net.safetensors", "net.pt", "net"])


@FORMATS
@pytest.mark.parametrize("inner", [12, HIDDEN])  # as wide as the hidden state, and then shapes do not tell
def test_each_expert_is_a_layer(tmp_path: Path, name: str, inner: int) -> None:
    state = dbrx(inner)
    found = {weight.name: weight for weight in find_weights(saved(tmp_path / name, state))}
    for word, axis in (("w1", 0), ("v1", 0), ("w2", 1)):
        matrix = state[f"{BLOCK}.experts.mlp.{word}"]
        for expert in range(EXPERTS):
            weight = found.pop(f"{BLOCK}.experts.mlp.{word}.{expert}")
            own = matrix[expert * inner : (expert + 1) * inner]
            assert (weight.kind, weight.shape, weight.channel_axis) == ("linear", (inner, HIDDEN), axis)
            assert weight.tensor().equal(own)
            assert weight.rows(1, 3).equal(own.movedim(axis, 0)[1:3])
            assert weight.cut(2, 5).tensor().equal(own.movedim(axis, 0)[2:5].movedim(0, axis))
    assert set(found) == {"transformer.blocks.0.norm_attn_norm.attn.Wqkv", f"{BLOCK}.router.layer"}


def test_the_stack_has_the_matrixs_values(tmp_path: Path) -> None:
    state = dbrx()
    for path in (saved(tmp_path / "net.safetensors", state), saved(tmp_path / "net.pt", state)):
        stack = with_stacks(open_checkpoint(path))[f"{BLOCK}.experts.mlp.w2"]
        expected = state[f"{BLOCK}.experts.mlp.w2"].reshape(EXPERTS, 12, HIDDEN)
        assert stack.tensor().equal(expected)
        assert stack.read_rows.cut(1, 3)(1, 2).equal(expected[2].reshape(1, -1))


@pytest.mark.parametrize("router", [None, 5])  # 36 rows are no five matrices
def test_without_a_router_that_says_how_many_they_are_left_alone(tmp_path: Path, router: int | None) -> None:
    found = find_weights(saved(tmp_path / "net.safetensors", dbrx(router=router)))
    assert "transformer.blocks.0.norm_attn_norm.attn.Wqkv" in [weight.name for weight in found]
    reason = "experts in one matrix, and no router of as many outputs beside them says how many"
    assert [(name, why) for name, why in found.left_alone if "experts" in name] == [
        (f"{BLOCK}.experts.mlp.{name}", reason) for name in ("v1", "w1", "w2")
    ]


def planned(source: Path) -> Plan:
    table = measure(source, PER_CHANNEL, (3,), skip=[f"{BLOCK}.experts.mlp.w2.1", "role:routers"])
    return Uniform(bits=3)(table)


@FORMATS
def test_they_are_written_and_packed_as_each_ones_choice_leaves_it(tmp_path: Path, name: str) -> None:
    state = dbrx()
    source = saved(tmp_path / name, state)
    plan = planned(source)
    assert plan.rest_bytes == 4 * (12 * HIDDEN + EXPERTS * HIDDEN)
    assert not match(plan, source, weights=True).notes
    rewrite(source, plan, tmp_path / f"out{Path(name).suffix}")
    container = compress(source, plan, tmp_path / "net.mpqc")
    expected = {
        key: torch.cat([
            one if (choice := plan.by_name.get(f"{key}.{k}")) is None else simulate_layer(one, choice)
            for k, one in enumerate(value.split(12))
        ]) if ".experts." in key else value
        for key, value in state.items()
    }  # fmt: skip
    wqkv = "transformer.blocks.0.norm_attn_norm.attn.Wqkv"
    expected[f"{wqkv}.weight"] = simulate_layer(state[f"{wqkv}.weight"], plan.by_name[wqkv])
    assert expected[f"{BLOCK}.experts.mlp.w2"][12:24].equal(state[f"{BLOCK}.experts.mlp.w2"][12:24])
    for found in (read(tmp_path / f"out{Path(name).suffix}"), decompress(container)):
        assert found.keys() == expected.keys()
        assert all(found[key].equal(value) for key, value in expected.items())
    key = f"{BLOCK}.experts.mlp.w1"
    assert container.tensor(key).equal(expected[key])


def read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        return {key: value for file in sorted(path.glob("*.safetensors")) for key, value in load_file(file).items()}
    return load_file(path) if path.suffix == ".safetensors" else dict(torch.load(path))
