"""Mixtures of experts: stacked as mlx-lm has them, whatever of them stays in float."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mpq_plugins import Plan, SettingError, VerifyError
from mpq_plugins.adapters import mlx
from mpq_plugins.simulation.checkpoint import rewrite
from tests.adapters.llamas import GROUPS, IDS, load, logits, plan_of, save_experts

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers and mlx-lm warn of is their own

ASYMMETRIC = replace(GROUPS, symmetric=False)
BY_PROJECTION = {"w1": 4, "gate_proj": 4, "w2": 6, "down_proj": 6, "w3": 3, "up_proj": 3}


def planned(source: Path, floats: tuple[str, ...] = ()) -> Plan:
    """Widths by projection; in float what begins so."""

    def bits(place: int, name: str) -> int:
        if name.startswith(floats):
            return 32
        return BY_PROJECTION[name.rpartition(".")[2]] if ".experts." in name else (2, 3, 4, 5, 6, 8)[place % 6]

    return plan_of(source, ASYMMETRIC, bits, ("role:routers",))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("floats", [("none",), ("model.layers.0",)], ids=["all", "one block in float"])
def test_mlx_lm_runs_them_packed(tmp_path: Path, kind: str, floats: tuple[str, ...]) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    source = save_experts(tmp_path / "source", kind)
    plan = planned(source, floats)
    written = mlx.export(source, plan, tmp_path / "out")
    assert len(mlx.verify(tmp_path / "out", plan, source)) == written.layers
    model, _ = utils.load_model(tmp_path / "out")
    block = model.model.layers[1]
    experts = block.block_sparse_moe if kind == "mixtral" else block.mlp
    assert type(experts.switch_mlp.down_proj).__name__ == "QuantizedSwitchLinear"
    assert experts.switch_mlp.down_proj.bits == 6
    found = torch.from_numpy(np.array(model(mx.array(IDS.numpy()))))
    rewrite(source, plan, tmp_path / "simulated")
    expected = logits(load(tmp_path / "simulated"))
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_experts_that_all_stay_in_float_are_left_to_mlx_lm(tmp_path: Path) -> None:
    source = save_experts(tmp_path / "source", "mixtral")
    plan = plan_of(source, ASYMMETRIC, lambda _, name: 32 if "experts" in name else 4)
    mlx.export(source, plan, tmp_path / "out")
    mlx.verify(tmp_path / "out", plan, source)
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in load_file(tmp_path / "out/model.safetensors")


def test_experts_of_a_stack_that_differ_are_refused_with_the_tie(tmp_path: Path) -> None:
    source = save_experts(tmp_path / "source", "mixtral")
    mlx.check(plan_of(source, ASYMMETRIC, 4), source)
    for width in (8, 32):
        odd = plan_of(source, ASYMMETRIC, partial(widths, width))
        with pytest.raises(SettingError, match=r"experts.2.w3': differs from '.*experts.0.w3'.*--tie experts"):
            mlx.check(odd, source)


def widths(odd: int, _: int, name: str) -> int:
    return odd if "experts.2.w3" in name else 4


def test_models_whose_experts_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    source = save_experts(tmp_path / "source", "mixtral")
    plan = planned(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "other"}))
    with pytest.raises(SettingError, match=r"known of mixtral, .* and this is 'other'; skip them"):
        mlx.check(plan, source)


@pytest.mark.parametrize("kind", ["code", "missing", "fewer"])
def test_what_does_not_hold_the_plan_is_found_in_stacks(tmp_path: Path, kind: str) -> None:
    source = save_experts(tmp_path / "source", "mixtral")
    plan, output = planned(source), tmp_path / "out"
    mlx.export(source, plan, output)
    tensors = load_file(output / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.switch_mlp.up_proj.weight"
    if kind == "code":
        tensors[name].view(torch.int32)[2, 5, 0] ^= 1
    elif kind == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:3].clone()
    save_file(tensors, output / "model.safetensors", {"format": "mlx"})
    said = "'model.layers.1.block_sparse_moe.experts.2.w3' has 1 of" if kind == "code" else "w3.weight' is missing"
    with pytest.raises(VerifyError, match=said):
        mlx.verify(output, plan, source)
