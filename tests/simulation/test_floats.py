"""16 bits is float16: in a module, in a checkpoint, and nothing beyond what float16 holds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpq_plugins import Affine, Part, Plan, Uniform, apply, measure, verify
from mpq_plugins.checkpoints.checkpoint import load_torch
from mpq_plugins.checkpoints.shards import INDEX_NAME
from mpq_plugins.errors import VerifyError, WeightError
from mpq_plugins.simulation.checkpoint import rewrite
from mpq_plugins.simulation.floats import as_float
from tests.helpers.checkpoints import sharded
from tests.helpers.nets import conv_net, tied_net
from tests.helpers.plans import with_layer
from tests.helpers.says import naming

PER_CHANNEL = Affine(granularity="per_channel")


def planned(source: nn.Module | Path, *halves: str, bits: int = 16) -> Plan:
    """Four bits, and these layers at 16."""
    plan = Uniform(bits=4)(measure(source, PER_CHANNEL, (4,), fold_bn=False))
    for name in halves:
        plan = with_layer(plan, name, bits=bits)
    return plan


def as_numpy_has_it(weight: Tensor) -> Tensor:
    return torch.from_numpy(weight.detach().numpy().astype(np.float16).astype(np.float32))


@given(arrays(np.float32, (3, 5), elements=st.floats(-65504, 65504, width=32)))
def test_values_are_rounded_as_numpy_rounds_them(values: np.ndarray) -> None:
    weight = torch.from_numpy(values)
    half = as_float(weight, 16, "fc")
    assert half.dtype == torch.float32
    assert half.equal(as_numpy_has_it(weight))
    assert as_float(half, 16, "fc").equal(half)
    assert as_float(weight, 32, "fc") is weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_has_16_bits_already_is_kept(dtype: torch.dtype) -> None:
    net = nn.Linear(4, 3).to(dtype)
    plan = planned(net, "")
    made = apply(net, plan)
    assert isinstance(made, nn.Linear)
    assert made.weight.equal(net.weight)
    assert made.weight.dtype == dtype
    verify(made, plan, original=net)


def test_a_module_keeps_its_dtype_and_gets_the_values() -> None:
    net = conv_net()
    plan = planned(net, "conv2", "up")
    made = apply(net, plan)
    for name in ("conv2", "up"):
        before, after = net.get_submodule(name).weight, made.get_submodule(name).weight
        assert isinstance(before, Tensor)
        assert isinstance(after, Tensor)
        assert after.equal(as_numpy_has_it(before))
        assert not after.equal(before)
    verify(made, plan, original=net)
    with pytest.raises(VerifyError, match=naming("'conv2'")):
        verify(apply(net, planned(net, "conv2", "up", bits=32)), plan, original=net)


def test_a_folded_plan_rounds_the_folded_weight() -> None:
    net = conv_net()
    measured = measure(net, Affine(), (4,), fold_bn=True)
    plan = with_layer(Uniform(bits=4)(measured), "conv1", bits=16)
    alone = apply(net, with_layer(plan, "conv1", bits=32)).get_submodule("conv1").weight
    assert isinstance(alone, Tensor)
    assert apply(net, plan).get_submodule("conv1").weight.equal(as_numpy_has_it(alone))  # type: ignore[operator]


@pytest.mark.parametrize("value", [65505.0, -65519.0, 1e6])
def test_beyond_float16_is_an_error_with_the_layer_and_the_value(value: float, tmp_path: Path) -> None:
    net = conv_net()
    with torch.no_grad():
        net.fc.weight[0, 0] = value
    plan = planned(net, "fc")
    with pytest.raises(WeightError, match=naming("'fc'", f"{abs(value):g}", "65504", "32")):
        apply(net, plan)
    assert apply(net, planned(net, "fc", bits=32)).get_submodule("fc").weight.equal(net.fc.weight)  # type: ignore[operator]
    torch.save(net.state_dict(), tmp_path / "in.pt")
    with pytest.raises(WeightError, match="'fc'"):
        rewrite(tmp_path / "in.pt", plan, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_checkpoint_holds_float16_that_a_float32_model_loads(tmp_path: Path, ending: str) -> None:
    net, loaded = conv_net(), conv_net()
    source, target = tmp_path / f"in.{ending}", tmp_path / f"out.{ending}"
    if ending == "pt":
        torch.save(net.state_dict(), source)
    else:
        save_file(net.state_dict(), source)
    plan = planned(net, "conv1", "up")
    rewrite(source, plan, target)
    out = load_torch(target) if ending == "pt" else load_file(target)
    dtypes = {name: value.dtype for name, value in net.state_dict().items()}
    assert {name: value.dtype for name, value in out.items()} == dtypes | dict.fromkeys(
        ["conv1.weight", "up.weight"], torch.float16
    )
    loaded.load_state_dict(out)
    verify(loaded, plan, original=net)
    assert all(value.equal(apply(net, plan).state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_layer_with_parts_keeps_its_dtype_and_its_half_has_float16_values(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    save_file({"fc.weight": weight}, tmp_path / "in.safetensors")
    parts = (Part(bits=16, channels=(1, 4)), Part(bits=32, channels=(0, 2, 3, 5)))
    plan = with_layer(planned(tmp_path / "in.safetensors"), "fc", bits=None, parts=parts)
    rewrite(tmp_path / "in.safetensors", plan, tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")["fc.weight"]
    assert out.dtype == torch.float32
    assert out[[1, 4]].equal(as_numpy_has_it(weight[[1, 4]]))
    assert out[[0, 2, 3, 5]].equal(weight[[0, 2, 3, 5]])


def test_tied_names_share_the_float16_tensor(tmp_path: Path) -> None:
    net = tied_net()
    torch.save(net.state_dict(), tmp_path / "in.pt")
    rewrite(tmp_path / "in.pt", planned(net, "embed"), tmp_path / "out.pt")
    out = load_torch(tmp_path / "out.pt")
    assert out["embed.weight"].dtype == out["lm_head.weight"].dtype == torch.float16
    assert out["embed.weight"].data_ptr() == out["lm_head.weight"].data_ptr()


@pytest.mark.parametrize("halves", [1, 2])
def test_stacked_experts_are_float16_where_all_of_them_are(tmp_path: Path, halves: int) -> None:
    stack = torch.randn(2, 8, 12)
    save_file({"mlp.experts.down_proj": stack}, tmp_path / "in.safetensors")
    names = [f"mlp.experts.down_proj.{expert}" for expert in range(halves)]
    plan = planned(tmp_path / "in.safetensors", *names)
    rewrite(tmp_path / "in.safetensors", plan, tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")["mlp.experts.down_proj"]
    assert out.dtype == (torch.float16 if halves == 2 else torch.float32)
    assert out[:halves].float().equal(as_numpy_has_it(stack[:halves]))


def test_the_index_of_a_directory_tells_its_new_size(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.randn(8, 4) for i in range(4)} | {"norm.weight": torch.ones(4)}
    source = sharded(tmp_path / "in", state)
    index = json.loads((source / INDEX_NAME).read_text())
    index["metadata"] = {"total_size": sum(tensor.nbytes for tensor in state.values())}
    (source / INDEX_NAME).write_text(json.dumps(index))
    rewrite(source, planned(source, "layers.0", "layers.3"), tmp_path / "out")
    written = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    shards = {tmp_path / "out" / shard for shard in written["weight_map"].values()}
    assert written["metadata"]["total_size"] == sum(t.nbytes for shard in shards for t in load_file(shard).values())
    assert written["weight_map"] == index["weight_map"]
