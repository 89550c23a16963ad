"""Checkpoints that are quantized already are refused by name, and what is left of them is planned on request only."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mpq_plugins import Uniform, find_weights, measure
from mpq_plugins.errors import SourceError
from mpq_plugins.simulation.checkpoint import rewrite
from tests.helpers.says import naming

LAYER = "model.layers.0.mlp.up_proj"


def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(0, 100, shape).to(dtype)


FORMATS: dict[str, dict[str, Tensor]] = {
    "gptq": {"qweight": integers(2, 8), "qzeros": integers(1, 1), "scales": torch.ones(1, 8), "g_idx": integers(16)},
    "awq": {"qweight": integers(16, 1), "qzeros": integers(1, 1), "scales": torch.ones(1, 8)},
    "compressed-tensors": {"weight_packed": integers(8, 2), "weight_scale": torch.ones(8, 1)},
    "int8 of compressed-tensors": {"weight": integers(8, 16, dtype=torch.int8), "weight_scale": torch.ones(8, 1)},
    "bitsandbytes, 4 bits": {"weight": integers(64, 1, dtype=torch.uint8), "weight.absmax": torch.ones(2)},
    "bitsandbytes, 8 bits": {"weight": integers(8, 16, dtype=torch.int8), "SCB": torch.ones(8)},
    "mxfp4": {
        "experts.up_proj_blocks": integers(2, 8, 1, 16, dtype=torch.uint8),
        "experts.up_proj_scales": integers(2, 8, 1, dtype=torch.uint8),
    },
    "hqq": {"W_q": integers(8, 8, dtype=torch.uint8), "meta": torch.ones(2)},
    "quanto": {"weight._data": integers(8, 16, dtype=torch.int8), "weight._scale": torch.ones(8, 1)},
    "aqlm": {"codes": integers(8, 2, 1, dtype=torch.int16), "codebooks": torch.ones(1, 16, 1, 8)},
    "mlx": {"weight": integers(8, 2, dtype=torch.uint32), "scales": torch.ones(8, 1), "biases": torch.ones(8, 1)},
    "higgs": {"weight": integers(8, 4, dtype=torch.int16), "tables": torch.ones(16, 2), "scales": torch.ones(8)},
    "vptq": {"indices": integers(1, 8, 4), "centroids.weight": torch.ones(1, 64)},
    "quip#": {"Qidxs": integers(8, 4, dtype=torch.int64), "SU": torch.ones(8)},
    "exllama, second": {"q_weight": integers(8, 8), "q_scale": integers(8, 8), "q_groups": integers(8)},
    "exllama, third": {"trellis": integers(2, 2, 16, dtype=torch.int16), "suh": torch.ones(8)},
    "spqr": {"dense_weights": integers(8, dtype=torch.int64), "row_offsets": integers(9)},
    "nvfp4": {
        "weight": integers(8, 8, dtype=torch.uint8), "weight_scale": torch.ones(8, 1).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.ones(()),
    },
}  # fmt: skip


def packed(folder: Path, kind: str, **config: Any) -> Path:
    folder.mkdir()
    state = {f"{LAYER}.{name}": value for name, value in FORMATS[kind].items()}
    state |= {"model.embed_tokens.weight": torch.randn(9, 4), "lm_head.weight": torch.randn(9, 4)}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_a_packed_checkpoint_is_refused_by_a_tensors_name(tmp_path: Path, kind: str) -> None:
    source = packed(tmp_path / "in", kind, quantization_config={"quant_method": "some-method"})
    with pytest.raises(
        SourceError, match=naming("quantized already", "some-method", "config.json", f"'{LAYER}")
    ) as caught:
        find_weights(source)
    assert "--already-quantized" in str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_left_in_floating_point_is_planned_where_that_is_wanted(tmp_path: Path, kind: str) -> None:
    source = packed(tmp_path / "in", kind)
    table = measure(source, bits=(4,), already_quantized=True)
    left = {"model.embed_tokens", "lm_head"} | ({f"{LAYER}.centroids"} if kind == "vptq" else set())
    assert {layer.name for layer in table.layers} == left
    rewrite(source, Uniform(bits=4)(table), tmp_path / "out")


def test_layers_that_torch_packed_are_no_tensors_and_seen_all_the_same(tmp_path: Path) -> None:
    own = {"1.scale": torch.tensor(1.0), "1._packed_params._packed_params": (torch.ones(2, 2), None)}
    torch.save({"state_dict": {"0.weight": torch.randn(2, 2), **own}}, tmp_path / "x.pt")
    with pytest.raises(SourceError, match=naming("quantized already", "'state_dict.1._packed_params")):
        find_weights(tmp_path / "x.pt")
    assert [weight.name for weight in find_weights(tmp_path / "x.pt", already_quantized=True)] == ["0"]


def test_integers_that_are_no_weights_pack_nothing(tmp_path: Path) -> None:
    state = {
        "fc.weight": torch.randn(4, 4), "position_ids": torch.arange(6).reshape(1, 6),
        "index.weight": torch.ones(2, 2, dtype=torch.int64), "table.weight": torch.ones(2, 2, dtype=torch.int32),
        "mask.weight": torch.ones(2, 2).bool(),
        "token_blocks": torch.ones(2, 2, dtype=torch.uint8),
    }  # fmt: skip
    save_file(state, tmp_path / "in.safetensors")
    found = find_weights(tmp_path / "in.safetensors")
    assert [weight.name for weight in found] == ["fc"]
    assert {name for name, _ in found.left_alone} == set(state) - {"fc.weight"}


@pytest.mark.parametrize(("dtype", "size"), [("F8_E8M0", 16), ("F4", 8), ("F6_E2M3", 12), ("C64", 128)])
@pytest.mark.parametrize("name", ["fc.scale", "x.weight"])
def test_a_dtype_that_is_not_known_is_left_alone_and_listed(tmp_path: Path, dtype: str, size: int, name: str) -> None:
    weight = torch.randn(4, 4)
    header = json.dumps({
        "fc.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]},
        name: {"dtype": dtype, "shape": [4, 4], "data_offsets": [64, 64 + size]},
    }).encode()  # fmt: skip
    data = len(header).to_bytes(8, "little") + header + weight.numpy().tobytes() + bytes(size)
    (tmp_path / "in.safetensors").write_bytes(data)
    found = find_weights(tmp_path / "in.safetensors")
    assert [own.name for own in found] == ["fc"]
    assert found.left_alone == ((name, f"dtype {dtype}"),)
    plan = Uniform(bits=4)(measure(tmp_path / "in.safetensors", bits=(4,)))
    if dtype.startswith("F6"):  # which the library cannot write again
        with pytest.raises(SourceError, match=r"in\.safetensors: cannot be written again"):
            rewrite(tmp_path / "in.safetensors", plan, tmp_path / "out.safetensors")
        return
    rewrite(tmp_path / "in.safetensors", plan, tmp_path / "out.safetensors")
    assert find_weights(tmp_path / "out.safetensors").left_alone == found.left_alone
