"""Weights of 8-bit floating point are read as what they mean: codes times scales, a chunk at a time."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mpq_plugins import Affine, Uniform, compress, find_weights, measure
from mpq_plugins.errors import SettingError, WeightError
from mpq_plugins.simulation.checkpoint import rewrite
from mpq_plugins.simulation.match import match
from tests.helpers.says import naming

sides = st.sampled_from([1, 3, 127, 128, 129, 200, 256, 300])


def saved(folder: Path, codes: Tensor, scale: Tensor, name: str, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"a.fc.weight": codes, f"a.fc.{name}": scale}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def meant(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """By a loop over blocks."""
    wide = codes.float()
    for row in range(-(-codes.shape[0] // block[0])):
        for column in range(-(-codes.shape[1] // block[1])):
            own = (slice(row * block[0], (row + 1) * block[0]), slice(column * block[1], (column + 1) * block[1]))
            wide[own] *= scale[row, column].float()
    return wide


@pytest.mark.slow
@given(sides, sides, st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]), st.sampled_from([128, 64, None]))
def test_blocks_of_deepseeks(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, dtype: torch.dtype, said: int | None
) -> None:
    size = said or 128
    draw = torch.Generator().manual_seed(rows * 1000 + columns)
    codes = torch.randn(rows, columns, generator=draw).to(dtype)
    scale = torch.rand(-(-rows // size), -(-columns // size), generator=draw) + 0.1
    config = {"quantization_config": {"weight_block_size": [said, said]}} if said else {}
    source = saved(tmp_path_factory.mktemp("fp8"), codes, scale, "weight_scale_inv", **config)
    (weight,) = find_weights(source)
    expected = meant(codes, scale, (size, size))
    assert (weight.name, weight.shape, weight.dtype, weight.scale) == (
        "a.fc", (rows, columns), torch.float32, "a.fc.weight_scale_inv",
    )  # fmt: skip
    assert weight.tensor().equal(expected)
    middle = rows // 2
    part = copy.deepcopy(weight.cut(middle, rows))  # as a worker is sent it
    assert part.rows(0, rows - middle).equal(expected[middle:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "block"), [
    ((6, 1), (1, 8)), ((6,), (1, 8)), ((1,), (6, 8)), ((), (6, 8)), ((1, 1), (6, 8)), ((6, 2), (1, 4)),
])  # fmt: skip
def test_scales_of_outputs_groups_and_whole_tensors(
    tmp_path: Path, shape: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype
) -> None:
    codes, scale = torch.randn(6, 8).to(torch.float8_e4m3fn), (torch.rand(shape) + 0.1).to(dtype)
    source = saved(tmp_path / "in", codes, scale, "weight_scale")
    (weight,) = find_weights(source)
    two = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    assert weight.tensor().equal(meant(codes, two, block))


def test_a_table_is_that_of_the_weights_that_are_meant(tmp_path: Path) -> None:
    codes, scale = torch.randn(300, 200).to(torch.float8_e4m3fn), torch.rand(3, 2) + 0.1
    source = saved(tmp_path / "in", codes, scale, "weight_scale_inv")
    save_file({"a.fc.weight": meant(codes, scale, (128, 128))}, tmp_path / "meant.safetensors")
    scheme = Affine(granularity="per_channel")
    ours, theirs = (measure(own, scheme, (3, 4)) for own in (source, tmp_path / "meant.safetensors"))
    assert ours.fingerprint == theirs.fingerprint
    assert (ours.layers[0].errors["mse"] == theirs.layers[0].errors["mse"]).all()


def test_what_a_plan_makes_of_it_cannot_be_written_into_eight_bits(tmp_path: Path) -> None:
    source = saved(tmp_path / "in", torch.randn(4, 4).to(torch.float8_e4m3fn), torch.ones(1, 1), "weight_scale_inv")
    plan = Uniform(bits=4)(measure(source, bits=(4,)))
    assert match(plan, source, weights=True).notes == ()
    for write in (lambda: rewrite(source, plan, tmp_path / "out"), lambda: compress(source, plan, tmp_path / "x.mpq")):
        with pytest.raises(SettingError, match=naming("'a.fc'", "'a.fc.weight_scale_inv'", "bfloat16")):
            write()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "x.mpq").exists()


@pytest.mark.parametrize(("scale", "name", "message"), [
    (torch.ones(3, 5), "weight_scale", r"how 'a\.fc\.weight_scale' scales it is not known \(\[3, 5\] for \[4, 8\]"),
    (torch.ones(2, 2), "weight_scale_inv", "is not known"),
    (torch.ones(2), "weight_scale", "is not known"),  # of parts that were fused, of whatever sizes
    (torch.ones(2, 1), "weight_scale", "is not known"),
    (torch.ones(4, 1, dtype=torch.uint8), "weight_scale", "is not known.*torch.uint8"),
    (torch.ones(4, 1, 1), "weight_scale", "is not known"),
    (torch.ones(4, 1), "input_scale", r"no tensor scales it, such as a\.fc\.weight_scale"),
])  # fmt: skip
def test_scales_that_do_not_fit_are_named(tmp_path: Path, scale: Tensor, name: str, message: str) -> None:
    source = saved(tmp_path / "in", torch.randn(4, 8).to(torch.float8_e4m3fn), scale, name)
    with pytest.raises(WeightError, match=rf"layer 'a\.fc': dtype torch\.float8_e4m3fn is not allowed.*{message}"):
        find_weights(source)
