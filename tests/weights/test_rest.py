"""What is stored beside the planned weights, to the byte, against files and state dicts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpq_plugins import Affine, LayerTable, measure
from mpq_plugins.models.folding import folded_copy
from mpq_plugins.weights.find import find_weights
from mpq_plugins.weights.rest import rest_bytes
from tests.helpers.checkpoints import sharded
from tests.helpers.nets import conv_net, tied_net

PER_CHANNEL = Affine(granularity="per_channel")
PLANNED = {"conv1.weight", "conv2.weight", "up.weight", "fc.weight"}


def without(state: dict[str, Tensor], *planned: str) -> int:
    return sum(value.numel() * value.element_size() for name, value in state.items() if name not in planned)


def rest_of(source: "nn.Module | Path", **options: object) -> int | None:
    return rest_bytes(source, find_weights(source, **options))  # type: ignore[arg-type]


def test_a_modules_biases_norms_buffers_and_skipped_layers() -> None:
    net = conv_net()
    state = net.state_dict()
    assert rest_of(net) == without(state, *PLANNED)
    assert rest_of(net, skip=["up"]) == without(state, *PLANNED - {"up.weight"})
    assert rest_of(net, only=["fc"]) == without(state, "fc.weight")


@pytest.mark.parametrize("skip", [[], ["conv1"], ["conv2"]], ids=str)
def test_folded_norms_are_gone_and_their_biases_are_there(skip: list[str]) -> None:
    net = conv_net()
    table = measure(net, Affine(), (4,), skip=skip, fold_bn=True)
    assert table.fold_bn
    state = folded_copy(net, table).state_dict()
    assert table.rest_bytes == without(state, *PLANNED - {f"{name}.weight" for name in skip})


@pytest.mark.parametrize("ending", ["safetensors", "pt", "directory"])
def test_a_checkpoint_as_its_file_holds_it(tmp_path: Path, ending: str) -> None:
    state = conv_net().state_dict() | {"fc.bias": torch.zeros(10, dtype=torch.float16)}
    source = tmp_path / f"net.{ending}"
    if ending == "safetensors":
        save_file(state, source)
    elif ending == "pt":
        torch.save({"state_dict": state, "optimizer": {"momentum": torch.ones(1000)}}, source)
    else:
        sharded(source, state, 3)
    assert rest_of(source) == without(state, *PLANNED)
    assert measure(source, PER_CHANNEL, (4,)).rest_bytes == rest_of(source)


def test_of_several_sets_only_the_one_that_is_meant(tmp_path: Path) -> None:
    small, large = nn.Linear(4, 4).state_dict(), nn.Linear(4, 4).state_dict() | {"more": torch.ones(50)}
    torch.save({"state_dict": small, "state_dict_ema": large}, tmp_path / "x.pt")
    measured = measure(tmp_path / "x.pt", bits=(4,), weights="state_dict_ema")
    assert measured.rest_bytes == 4 * (4 + 50)
    assert measure(tmp_path / "x.pt", bits=(4,), weights="state_dict").rest_bytes == 4 * 4


def test_tied_weights_are_neither_counted_nor_counted_twice(tmp_path: Path) -> None:
    net = tied_net()
    biases = 4 * 8  # of `block`, which is registered twice
    assert rest_of(net) == biases
    assert rest_of(net, skip=["embed"]) == biases + 4 * 20 * 8
    torch.save(net.state_dict(), tmp_path / "x.pt")
    assert rest_of(tmp_path / "x.pt") == biases


@pytest.mark.parametrize("skip", [[], ["*.1"], ["*.0", "*.1"]], ids=str)
def test_of_stacked_experts_those_that_are_not_planned(tmp_path: Path, skip: list[str]) -> None:
    state = {
        "mlp.experts.down_proj": torch.randn(3, 8, 12),
        "fc.weight": torch.randn(4, 4),
        "norm.weight": torch.ones(5),
    }
    save_file(state, tmp_path / "x.safetensors")
    assert rest_of(tmp_path / "x.safetensors", skip=skip) == 4 * (5 + len(skip) * 8 * 12)


def test_the_scales_of_8_bit_floating_point_go_with_the_codes(tmp_path: Path) -> None:
    state = {
        "fc.weight": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "fc.weight_scale": torch.ones(()),
        "fc.bias": torch.zeros(4),
    }
    save_file(state, tmp_path / "x.safetensors")
    assert rest_of(tmp_path / "x.safetensors") == 4 * 4


def test_what_cannot_be_told_is_not_guessed() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net.register_buffer("graph", torch.eye(4).to_sparse())
    assert rest_of(net) is None
    renaming = nn.Sequential(nn.Linear(4, 4))
    renaming.register_state_dict_post_hook(lambda _, state, *rest: state.update(other=state.pop("0.weight")))
    assert rest_of(renaming) is None


def test_the_meta_device_has_sizes_too() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with torch.device("meta"):
        net.add_module("more", nn.Embedding(10, 4))
    assert rest_of(net, skip=["more"]) == without(net.state_dict(), "0.weight")


def test_a_table_keeps_it_in_its_file_and_a_cache_tells_it_anew(tmp_path: Path) -> None:
    net, cache = conv_net(), tmp_path / "net.mpqt"
    table = measure(net, PER_CHANNEL, (4,), cache=cache)
    assert LayerTable.load(cache).rest_bytes == table.rest_bytes == without(net.state_dict(), *PLANNED)
    net.register_buffer("more", torch.zeros(100))
    assert measure(net, PER_CHANNEL, (4,), cache=cache).rest_bytes == without(net.state_dict(), *PLANNED)
