"""From any source to a file and back: to the bit what `apply` makes, and nothing lost beside it."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import (
    Affine,
    Codebook,
    Container,
    Deviations,
    GlobalSparsity,
    Part,
    Piecewise,
    Plan,
    Sparsity,
    compress,
    decompress,
    finish,
    prune,
)
from mpq_plugins.compression.codes import encode
from mpq_plugins.compression.container import part_shape
from mpq_plugins.compression.prune import Pruning
from mpq_plugins.compression.write import save_tensors
from mpq_plugins.errors import CompressWarning, MismatchError, SettingError, SourceError, WeightError
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.quantization.contract import PartCodes
from mpq_plugins.simulation.layer import simulate_layer
from tests.helpers.checkpoints import sharded
from tests.helpers.nets import conv_net, tied_net
from tests.helpers.plans import SCHEMES, fits, plans, with_layer

PARTS = (Part(bits=2, channels=(0, 3, 5)), Part(bits=3, channels=(1, 2)), Part(bits=16, channels=(4,)))


def uniform(source: "nn.Module | Path", scheme: Scheme | None = None, bits: int = 3, fold_bn: bool = False) -> Plan:
    scheme = scheme or Affine(granularity="per_channel")
    return mpq.Uniform(bits=bits)(mpq.measure(source, scheme, bits=(bits,), fold_bn=fold_bn))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(
        found[name].equal(expected[name]) and found[name].dtype == expected[name].dtype for name in expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.group_size is None], ids=str)
@pytest.mark.parametrize("coding", ["smallest", "packed"])
def test_what_comes_back_is_what_apply_makes(tmp_path: Path, scheme: Scheme, coding: str) -> None:
    net = conv_net()
    for bits in (1, 2, 4, 8):
        if fits(net, scheme, bits):
            plan = uniform(net, scheme, bits)
            container = compress(net, plan, tmp_path / "x.mpq", coding=coding)  # type: ignore[arg-type]
            assert container.plan == plan
            found = decompress(tmp_path / "x.mpq")
            assert same(found, mpq.apply(net, plan).state_dict())
            loaded = conv_net()
            loaded.load_state_dict(found)
            mpq.verify(loaded, plan, original=net)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans, st.booleans())
def test_any_plan_of_any_weights(tmp_path: Path, plan: Plan, packed: bool) -> None:
    torch.manual_seed(0)
    state = {f"{layer.name}.weight": torch.randn(layer.shape) for layer in plan.layers}
    save_file(state, tmp_path / "x.safetensors")
    compress(tmp_path / "x.safetensors", plan, tmp_path / "x.mpq", coding="packed" if packed else "smallest")
    found = decompress(tmp_path / "x.mpq")
    for layer in plan.layers:
        assert found[f"{layer.name}.weight"].equal(simulate_layer(state[f"{layer.name}.weight"], layer))


def test_codes_scales_and_centroids_come_back_part_by_part(tmp_path: Path) -> None:
    net = conv_net()
    for scheme in (Affine(), Piecewise(), Codebook()):
        plan = with_layer(uniform(net, scheme), "up", bits=None, parts=PARTS)
        container = compress(net, plan, tmp_path / "x.mpq")
        for layer in plan.layers:
            weight = net.get_submodule(layer.name).weight
            assert isinstance(weight, Tensor)
            for part, own in zip(layer.all_parts, container.parts(f"{layer.name}.weight"), strict=True):
                channels = weight.index_select(layer.channel_axis, torch.tensor(part.channels))
                if isinstance(own, PartCodes):
                    assert own.equals(encode(channels, part_shape(layer, part)))
                else:
                    assert own.dtype == torch.float16
                    assert own.equal(channels.half())
        assert same(decompress(container), mpq.apply(net, plan).state_dict())


def test_batch_norm_is_folded_where_the_plan_folded_it(tmp_path: Path) -> None:
    net = conv_net()
    plan = uniform(net, Affine(), 4, fold_bn=True)
    assert plan.fold_bn
    compress(net, plan, tmp_path / "x.mpq")
    assert same(decompress(tmp_path / "x.mpq"), mpq.apply(net, plan).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: value.to(dtype) for name, value in conv_net().state_dict().items() if value.is_floating_point()}
    state |= {
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
    }
    save_file(state, tmp_path / "in.safetensors")
    plan = uniform(tmp_path / "in.safetensors")
    compress(tmp_path / "in.safetensors", plan, tmp_path / "x.mpq")
    found = decompress(tmp_path / "x.mpq")
    for name, tensor in state.items():
        layer = plan.by_name.get(name.removesuffix(".weight"))
        expected = tensor if layer is None else simulate_layer(tensor, layer)
        assert found[name].dtype == tensor.dtype
        assert found[name].float().equal(expected.float())
    save_tensors(found, tmp_path / "out.safetensors")
    assert {name: t.dtype for name, t in load_file(tmp_path / "out.safetensors").items()} == {
        name: t.dtype for name, t in state.items()
    }


def test_from_shards(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.randn(8, 4) for i in range(5)} | {"norm.weight": torch.ones(4)}
    source = sharded(tmp_path / "in", state)
    plan = uniform(source)
    compress(source, plan, tmp_path / "x.mpq")
    found = decompress(tmp_path / "x.mpq")
    assert found.keys() == state.keys()
    assert found["layers.3.weight"].equal(simulate_layer(state["layers.3.weight"], plan.by_name["layers.3"]))


@pytest.mark.parametrize("legacy", [False, True])
def test_from_a_torch_checkpoint_without_what_is_no_tensor(tmp_path: Path, legacy: bool) -> None:
    net = tied_net()
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    content = {"epoch": 7, "state_dict": state, "best": 0.5}
    torch.save(content, tmp_path / "in.pth", _use_new_zipfile_serialization=not legacy)
    plan = uniform(tmp_path / "in.pth")
    with pytest.warns(CompressWarning, match="left out, no tensors of the model: epoch, best"):
        container = compress(tmp_path / "in.pth", plan, tmp_path / "x.mpq")
    assert container.header.left_out == ("epoch", "best")
    found = decompress(container)
    assert same(found, mpq.apply(net, uniform(net)).state_dict())
    assert found["lm_head.weight"] is found["embed.weight"]
    assert container.records["lm_head.weight"].same == "embed.weight"
    save_tensors(found, tmp_path / "out.safetensors")  # which has no ties
    net.load_state_dict(load_file(tmp_path / "out.safetensors"))


def test_experts_go_into_their_stack(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    state = {"model.embed_tokens.weight": torch.randn(30, 8), stack: torch.randn(3, 8, 12)}
    save_file(state, tmp_path / "in.safetensors")
    table = mpq.measure(tmp_path / "in.safetensors", Affine(granularity="per_channel"), bits=(3,), skip=[f"{stack}.1"])
    plan = mpq.Uniform(bits=3)(table)
    assert f"{stack}.2" in plan.by_name
    container = compress(tmp_path / "in.safetensors", plan, tmp_path / "x.mpq")
    found = decompress(container)
    assert found.keys() == state.keys()
    for expert, matrix in enumerate(state[stack]):
        choice = plan.by_name.get(f"{stack}.{expert}")
        assert found[stack][expert].equal(matrix if choice is None else simulate_layer(matrix, choice))
    assert container.tensor(stack).equal(found[stack])


@pytest.mark.parametrize(
    "pruning", [Sparsity(0.7), GlobalSparsity(0.7), Deviations(0.9), Sparsity({"conv*": 0.5})], ids=str
)
@pytest.mark.parametrize("scheme", [Affine(), Affine(symmetric=True), Piecewise(), Codebook()], ids=str)
def test_pruned_on_the_way(tmp_path: Path, pruning: Pruning, scheme: Scheme) -> None:
    net = conv_net()
    plan = uniform(net, scheme, 4)
    container = compress(net, plan, tmp_path / "x.mpq", prune=pruning)
    expected = mpq.apply(finish(prune(net, pruning)), plan).state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in decompress(container).items())
    assert container.header.made_with["pruning"] == str(pruning)


class Extra(nn.Module):
    """A layer whose weight has another name first, and state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
        self.fc = nn.Linear(8, 20, bias=False)
        self.fc.weight = self.table

    def get_extra_state(self) -> int:
        return 7

    def set_extra_state(self, state: int) -> None:
        pass


def test_a_weight_that_has_another_name_first(tmp_path: Path) -> None:
    net = Extra()
    plan = uniform(net)
    with pytest.warns(CompressWarning, match="left out, no tensors of the model: _extra_state"):
        container = compress(net, plan, tmp_path / "x.mpq")
    assert container.records["table"].same == "fc.weight"
    found = decompress(container)
    assert found["table"] is found["fc.weight"]
    assert found["table"].equal(simulate_layer(net.table, plan.by_name["fc"]))
    torch.save({name: t for name, t in net.state_dict().items() if isinstance(t, Tensor)}, tmp_path / "x.pt")
    assert decompress(compress(tmp_path / "x.pt", plan, tmp_path / "y.mpq")).keys() == {"table", "fc.weight"}


def test_a_weight_that_has_no_name_is_said(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 4))
    net.register_state_dict_post_hook(lambda module, state, *_: state.update(renamed=state.pop("0.weight")))
    with pytest.raises(SourceError, match="no tensor is the weight of '0'; does a hook rename"):
        compress(net, uniform(net), tmp_path / "x.mpq")
    assert not list(tmp_path.iterdir())


def test_views_of_one_storage_as_other_numbers_are_not_the_same(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 4, bias=False))
    values = torch.randn(6)
    net.register_buffer("real", values)
    net.register_buffer("bits", values.view(torch.int32))
    found = decompress(compress(net, uniform(net), tmp_path / "x.mpq"))
    assert found["bits"].dtype == torch.int32
    assert found["bits"].equal(values.view(torch.int32))


def test_what_a_nested_checkpoint_holds_beside_is_named_by_where_it_is(tmp_path: Path) -> None:
    state = {"fc.weight": torch.randn(4, 8), "fc.note": "no tensor"}
    torch.save({"model": {"state_dict": state, "ema": 1}, "epoch": 1}, tmp_path / "x.pt")
    with pytest.warns(CompressWarning):
        container = compress(tmp_path / "x.pt", uniform(tmp_path / "x.pt"), tmp_path / "x.mpq")
    assert container.header.left_out == ("epoch", "model.ema", "model.state_dict.fc.note")


def test_nothing_is_written_over_what_is_read(tmp_path: Path) -> None:
    source = sharded(tmp_path / "in", {f"layers.{i}.weight": torch.randn(8, 4) for i in range(4)})
    before = {path: path.read_bytes() for path in source.iterdir()}
    plan = uniform(source)
    for name in ("model-00001-of-00002.safetensors", "new.mpq"):
        with pytest.raises(SettingError, match="lies inside the source"):
            compress(source, plan, source / name)
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    save_file({"fc.weight": torch.randn(4, 4)}, tmp_path / "one.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "one.safetensors")
    with pytest.raises(SettingError, match="is the source itself"):
        compress(tmp_path / "one.safetensors", uniform(tmp_path / "one.safetensors"), tmp_path / "link")


def test_names_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    stack = "experts"
    state = {stack: torch.randn(2, 4, 4), f"{stack}.0": torch.randn(3)}
    torch.save(state, tmp_path / "x.pt")
    target = tmp_path / "x.mpq"
    target.write_bytes(b"precious")
    with pytest.raises(SourceError, match=r"tensor 'experts.0': another is called so too"):
        compress(tmp_path / "x.pt", uniform(tmp_path / "x.pt"), target)
    net = nn.Sequential(nn.Linear(8, 4))
    net.register_buffer("__metadata__", torch.zeros(2))
    with pytest.raises(SourceError, match="'__metadata__': safetensors files keep that name"):
        compress(net, uniform(net), target)
    assert target.read_bytes() == b"precious"


def test_only_what_is_quantized_is_pruned(tmp_path: Path) -> None:
    net = conv_net()
    plan = with_layer(uniform(net), "fc", bits=32)
    found = decompress(compress(net, plan, tmp_path / "x.mpq", prune=Sparsity(0.5)))
    assert found["fc.weight"].equal(net.fc.weight)
    assert (found["conv1.weight"] == 0).float().mean() >= 0.5


def test_codes_of_which_most_are_zero_are_stored_by_the_gaps_between_the_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 200, bias=False))
    plan = uniform(net, Affine(symmetric=True), 8)
    sizes = {}
    for share in (0.0, 0.3, 0.8):
        path = tmp_path / f"{share}.mpq"
        compress(net, plan, path, coding="packed", prune=Sparsity(share))
        sizes[share] = path.stat().st_size
    assert abs(sizes[0.3] - sizes[0.0]) < 100
    assert sizes[0.8] < 0.5 * sizes[0.0]  # 8 bits and 5 of a gap for a fifth of the weights


@pytest.mark.slow
def test_sizes_are_what_the_plan_promised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100, bias=False))
    scheme = Affine(granularity="per_channel")
    for plan in (
        uniform(net, scheme, 4),
        uniform(net, Affine(symmetric=True), 5),
        uniform(net, Piecewise(granularity="per_channel"), 8),
        uniform(net, Codebook(), 3),
        mpq.Budget(average_bits=2.5)(mpq.measure(net, scheme, range(1, 9), per_channel=True)),
    ):
        promised = plan.size().total_bytes
        biases = 4 * 200
        packed = compress(net, plan, tmp_path / "x.mpq", coding="packed").size
        assert abs(packed - biases - promised) <= 0.01 * promised + 4096
        layers = sum(r.block_bytes - 4 for r in Container.open(tmp_path / "x.mpq").records.values() if r.parts)
        assert layers - (promised - sum(s.part_map for s in plan.size().layers.values()) // 8) in range(-8, 8)
        assert compress(net, plan, tmp_path / "x.mpq").size <= packed + 100


@pytest.mark.parametrize(
    ("scheme", "bits", "message"),
    [
        (Affine(), 1, r"layers 'conv1' \(asymmetric per_tensor minmax, 1 bits\), 'conv2' .* 'fc' .*, 1 bits\)\. Plan"),
        (Piecewise(storage="shared"), 4, r"there is no 0 .*: layers 'conv1' \(two-region .*, 4 bits\), "),
    ],
)
def test_schemes_without_a_zero_cannot_be_pruned(tmp_path: Path, scheme: Scheme, bits: int, message: str) -> None:
    net = conv_net()
    with pytest.raises(SettingError, match=message):
        compress(net, uniform(net, scheme, bits), tmp_path / "x.mpq", prune=Sparsity(0.5))
    compress(net, uniform(net, scheme, bits), tmp_path / "x.mpq", prune=Sparsity({"fc": 0.0}))
    assert list(tmp_path.iterdir()) == [tmp_path / "x.mpq"]


def test_what_is_refused_leaves_no_file_and_changes_none(tmp_path: Path) -> None:
    net = conv_net()
    plan = uniform(net)
    target = tmp_path / "x.mpq"
    target.write_bytes(b"precious")
    with pytest.raises(MismatchError, match="another model"):
        compress(tied_net(), plan, target)
    with pytest.raises(SettingError, match="coding: 'best' is not allowed; smallest, packed"):
        compress(net, plan, target, coding="best")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="would prune all of it"):
        compress(net, plan, target, prune=Deviations(90))
    broken = conv_net()
    broken.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(WeightError, match="layer 'fc'"):
        compress(broken, plan, target)
    with pytest.raises(WeightError, match="layer 'fc'"):  # in float too, as `apply` has it
        compress(broken, with_layer(plan, "fc", bits=32), target)
    broken = conv_net()
    broken.register_buffer("spectrum", torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(SourceError, match=r"tensor 'spectrum': dtype torch.complex64"):
        compress(broken, plan, target)
    with pytest.raises(SourceError, match="cannot write there"):
        compress(net, plan, tmp_path / "no" / "x.mpq")
    assert target.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [target]


def test_a_container_is_no_checkpoint_and_says_so(tmp_path: Path) -> None:
    net = conv_net()
    compress(net, uniform(net), tmp_path / "x.mpq")
    with pytest.raises(SourceError, match="is a compressed model, not a checkpoint; `mpq decompress`"):
        mpq.measure(tmp_path / "x.mpq")


def test_the_same_gives_the_same_bytes(tmp_path: Path) -> None:
    net = conv_net()
    compress(net, uniform(net, Codebook()), tmp_path / "a.mpq", prune=Sparsity(0.5))
    compress(net, uniform(net, Codebook()), tmp_path / "b.mpq", prune=Sparsity(0.5))
    assert (tmp_path / "a.mpq").read_bytes() == (tmp_path / "b.mpq").read_bytes()


def test_progress_counts_weights(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    net = conv_net()
    plan = uniform(net)
    compress(net, plan, tmp_path / "x.mpq", progress=lambda *step: seen.append(step))
    assert [name for name, _, _ in seen] == [*plan.by_name, ""]
    assert seen[-1][1] == seen[-1][2] == sum(layer.numel for layer in plan.layers)
