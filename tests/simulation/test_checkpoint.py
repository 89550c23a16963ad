import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpq_plugins import Affine, MixQuant, Plan, Uniform, measure, verify
from mpq_plugins.checkpoints.checkpoint import load_torch
from mpq_plugins.checkpoints.shards import INDEX_NAME
from mpq_plugins.errors import MismatchError, SettingError
from mpq_plugins.quantization.quantize import fake_quantize
from mpq_plugins.simulation.checkpoint import rewrite
from tests.helpers.checkpoints import sharded
from tests.helpers.nets import conv_net, tied_net


def planned(path: Path) -> Plan:
    return MixQuant(qem=3)(measure(path, Affine(granularity="per_channel")))


def check_state(after: dict[str, Tensor], before: dict[str, Tensor], plan: Plan) -> None:
    assert list(after) == list(before)
    for name, tensor in before.items():
        layer = plan.by_name.get(name.removeprefix("module.").removesuffix(".weight"))
        expected = tensor if layer is None or layer.bits is None else fake_quantize(tensor, layer.bits, layer.scheme)
        assert after[name].equal(expected)
        assert after[name].dtype == tensor.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_in_safetensors_out(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: value.to(dtype) for name, value in conv_net().state_dict().items() if value.is_floating_point()}
    save_file(state, tmp_path / "in.safetensors", {"format": "pt", "note": "kept"})
    plan = planned(tmp_path / "in.safetensors")
    rewrite(tmp_path / "in.safetensors", plan, tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    check_state({name: out[name] for name in state}, state, plan)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}


def test_a_directory_in_a_directory_out(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.randn(8, 4) for i in range(5)} | {"norm.weight": torch.ones(4)}
    source = sharded(tmp_path / "in", state)
    plan = planned(source)
    rewrite(source, plan, tmp_path / "out")
    weight_map = json.loads((tmp_path / "out" / INDEX_NAME).read_text())["weight_map"]
    after = {name: load_file(tmp_path / "out" / shard)[name] for name, shard in weight_map.items()}
    check_state({name: after[name] for name in state}, state, plan)
    assert (tmp_path / "out" / "config.json").read_text() == (source / "config.json").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in source.iterdir())


@pytest.mark.parametrize("legacy", [False, True])
def test_a_torch_checkpoint_keeps_its_other_contents_prefixes_and_ties(tmp_path: Path, legacy: bool) -> None:
    net = tied_net()
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    content = {"epoch": 7, "state_dict": state, "best": 0.5}
    torch.save(content, tmp_path / "in.pth", _use_new_zipfile_serialization=not legacy)
    plan = Uniform(bits=3)(measure(tmp_path / "in.pth", bits=(3,)))
    rewrite(tmp_path / "in.pth", plan, tmp_path / "out.pth")
    out = load_torch(tmp_path / "out.pth")
    assert (out["epoch"], out["best"], list(out["state_dict"])) == (7, 0.5, list(state))
    embed, head = out["state_dict"]["module.embed.weight"], out["state_dict"]["module.lm_head.weight"]
    assert embed.data_ptr() == head.data_ptr()
    net.load_state_dict({name.removeprefix("module."): value for name, value in out["state_dict"].items()})
    verify(net, plan, original=tied_net())


def test_a_plan_for_another_model_touches_nothing(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / "in.safetensors")
    plan = Uniform(bits=4)(measure(conv_net(), bits=(4,), fold_bn=False))
    (tmp_path / "out.safetensors").write_text("precious")
    with pytest.raises(MismatchError, match="another model"):
        rewrite(tmp_path / "in.safetensors", plan, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_text() == "precious"


def test_targets_of_another_format_are_refused(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.randn(4, 4)}, tmp_path / "in.safetensors")
    plan = Uniform(bits=4)(measure(tmp_path / "in.safetensors", bits=(4,)))
    for target, message in (
        ("out.pth", r"should end in \.safetensors"),
        ("in.safetensors", "is the source itself"),
        ("", "is a directory"),
    ):
        with pytest.raises(SettingError, match=message):
            rewrite(tmp_path / "in.safetensors", plan, tmp_path / target)
    directory = sharded(tmp_path / "shards", {"fc.weight": torch.randn(4, 4)}, 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SettingError, match="name a new or empty one"):
        rewrite(directory, plan, tmp_path / "full")


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_an_interruption_leaves_the_old_and_no_rubbish(tmp_path: Path, kind: str) -> None:
    state = {"a.weight": torch.randn(4, 4), "b.weight": torch.randn(4, 4)}
    if kind == "file":
        source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
        save_file(state, source)
        target.write_text("old")
    else:
        source, target = sharded(tmp_path / "in", state), tmp_path / "out"
    plan = Uniform(bits=4)(measure(source, bits=(4,)))
    before = sorted(tmp_path.iterdir())

    def interrupt(name: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewrite(source, plan, target, interrupt)
    assert sorted(tmp_path.iterdir()) == before
    assert kind == "directory" or target.read_text() == "old"


def test_a_tie_to_a_name_that_is_no_layer_is_quantized_too(tmp_path: Path) -> None:
    weight = torch.randn(8, 8)
    torch.save({"shared_kernel": weight, "fc.weight": weight}, tmp_path / "in.pth")
    plan = Uniform(bits=2)(measure(tmp_path / "in.pth", bits=(2,)))
    rewrite(tmp_path / "in.pth", plan, tmp_path / "out.pth")
    out = load_torch(tmp_path / "out.pth")
    assert out["fc.weight"].unique().numel() <= 4
    assert out["shared_kernel"].equal(out["fc.weight"])


def test_a_directory_keeps_its_other_weights_and_is_not_written_into_itself(tmp_path: Path) -> None:
    source = sharded(tmp_path / "in", {"fc.weight": torch.randn(4, 4)}, 1)
    (source / "2_Dense").mkdir()
    save_file({"dense": torch.ones(2)}, source / "2_Dense" / "model.safetensors")
    plan = Uniform(bits=4)(measure(source, bits=(4,)))
    rewrite(source, plan, tmp_path / "out")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").exists()
    with pytest.raises(SettingError, match="lies inside the source"):
        rewrite(source, plan, source / "out")


def experts_state(transposed: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    up, down = ((2, 8, 24), (2, 12, 8)) if transposed else ((2, 24, 8), (2, 8, 12))
    return {
        "model.embed_tokens.weight": torch.randn(5, 8, generator=draw).to(dtype),
        "mlp.experts.gate_up_proj": torch.randn(up, generator=draw).to(dtype),
        "mlp.experts.gate_up_proj_bias": torch.randn(2, 24, generator=draw).to(dtype),
        "mlp.experts.down_proj": torch.randn(down, generator=draw).to(dtype),
        "mlp.gate.weight": torch.randn(2, 8, generator=draw).to(dtype),
    }


@pytest.mark.parametrize("scheme", [
    Affine(granularity="per_channel"), Affine(), Affine(granularity="per_group", group_size=4)
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["file", "directory", "torch"])
def test_each_of_stacked_experts_is_written_as_its_own_choice_leaves_it(
    tmp_path: Path, scheme: Affine, dtype: torch.dtype, transposed: bool, kind: str
) -> None:
    state = experts_state(transposed, dtype)
    source, target = (tmp_path / f"{end}.safetensors" for end in ("in", "out"))
    if kind == "file":
        save_file(state, source)
    elif kind == "directory":
        source, target = sharded(tmp_path / "in", state), tmp_path / "out"
    else:
        source, target = tmp_path / "in.pt", tmp_path / "out.pt"
        torch.save({f"module.{name}": value for name, value in state.items()}, source)
    skip = ["mlp.experts.down_proj.1", "role:routers"]
    plan = MixQuant(qem=3)(measure(source, scheme, skip=skip))
    rewrite(source, plan, target)
    if kind == "torch":
        after = {name.removeprefix("module."): value for name, value in load_torch(target).items()}
    else:
        files = [target] if kind == "file" else sorted(target.glob("*.safetensors"))
        after = {name: value for file in files for name, value in load_file(file).items()}
    expected = {name: value.clone() for name, value in state.items()}
    for layer in plan.layers:
        assert layer.bits is not None
        name, _, expert = layer.name.rpartition(".")
        if name not in state:
            expected[f"{layer.name}.weight"] = fake_quantize(state[f"{layer.name}.weight"], layer.bits, layer.scheme)
            continue
        matrix = state[name][int(expert)]
        expected[name][int(expert)] = fake_quantize(matrix, layer.bits, layer.scheme, channel_axis=int(transposed))
    assert len(plan.layers) == 4
    assert after.keys() == state.keys()
    for name, value in expected.items():
        assert after[name].equal(value)
        assert after[name].dtype == dtype
    assert not after["mlp.experts.gate_up_proj"].equal(state["mlp.experts.gate_up_proj"])
    assert after["mlp.experts.down_proj"][1].equal(state["mlp.experts.down_proj"][1])
    assert after["mlp.gate.weight"].equal(state["mlp.gate.weight"])
