from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from mpq_plugins import Uniform, apply, find_weights, iter_weights, measure, verify
from mpq_plugins.checkpoints.shards import INDEX_NAME
from mpq_plugins.errors import SettingError, SourceError, WeightError
from tests.helpers.checkpoints import sharded
from tests.helpers.nets import conv_net, tied_net
from tests.helpers.says import naming


def test_a_module_gives_its_quantizable_layers() -> None:
    found = {weight.name: weight for weight in find_weights(conv_net())}
    assert {name: weight.kind for name, weight in found.items()} == {
        "conv1": "conv2d", "conv2": "conv2d", "up": "conv_transpose2d", "fc": "linear",
    }  # fmt: skip
    assert found["up"].channel_axis == 1
    assert found["up"].channels == 6


def test_every_handle_gives_its_tensor_whole_and_by_rows() -> None:
    net = conv_net()
    for weight in find_weights(net):
        expected = net.get_submodule(weight.name).weight
        assert isinstance(expected, torch.Tensor)
        assert weight.tensor().equal(expected)
        rows = torch.cat([weight.rows(i, i + 1) for i in range(weight.channels)])
        assert rows.equal(expected.movedim(weight.channel_axis, 0).reshape(weight.channels, -1))


def test_tied_weights_and_shared_modules_appear_once() -> None:
    found = {weight.name: weight.tied for weight in find_weights(tied_net())}
    assert found == {"embed": ("lm_head",), "block": ("again",)}


def test_what_is_no_layer_is_listed_with_its_reason() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.lstm = nn.LSTM(4, 4)

    weights = find_weights(Attention())
    assert [weight.name for weight in weights] == ["attention.out_proj"]
    assert [name for name, _ in weights.left_alone] == [
        "attention.in_proj_weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format_name", ["safetensors", "torch", "torch-legacy", "nested", "parallel", "sharded"])
def test_every_file_format_gives_the_same_weights(tmp_path: Path, dtype: torch.dtype, format_name: str) -> None:
    state = {
        "conv1.weight": torch.randn(4, 3, 3, 3).to(dtype), "conv1.bias": torch.randn(4).to(dtype),
        "word_embeddings.weight": torch.randn(5, 4).to(dtype), "fc.weight": torch.randn(6, 4).to(dtype),
        "norm.weight": torch.randn(4).to(dtype), "position_ids": torch.arange(6).reshape(1, 6),
        "scale_table": torch.randn(2, 2).to(dtype),
    }  # fmt: skip
    path = tmp_path / ("model.safetensors" if format_name == "safetensors" else "model.pth")
    if format_name == "safetensors":
        save_file(state, path)
    elif format_name == "sharded":
        path = sharded(tmp_path / "shards", state)
    elif format_name == "nested":
        torch.save({"epoch": 3, "state_dict": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, path)
    elif format_name == "parallel":
        torch.save(OrderedDict((f"module.{name}", value) for name, value in state.items()), path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=format_name == "torch")
    found = find_weights(path)
    kinds = {weight.name: weight.kind for weight in found}
    assert kinds == {"conv1": "conv2d", "word_embeddings": "embedding", "fc": "linear"}
    for name, tensor in iter_weights(path):
        assert tensor.equal(state[f"{name}.weight"])
        assert tensor.dtype == dtype
    assert dict(found.left_alone) == {
        "position_ids": "dtype torch.int64", "scale_table": "its name does not end in .weight",
    }  # fmt: skip


def test_a_torch_checkpoint_knows_its_ties(tmp_path: Path) -> None:
    torch.save(tied_net().state_dict(), tmp_path / "model.pt")
    assert {w.name: w.tied for w in find_weights(tmp_path / "model.pt")} == {"embed": ("lm_head",), "block": ("again",)}


def test_a_directory_without_an_index_may_hold_one_file(tmp_path: Path) -> None:
    save_model(conv_net(), str(tmp_path / "model.safetensors"))
    assert len(find_weights(tmp_path)) == 4


def test_globs_choose_and_say_what_they_left_out() -> None:
    assert [w.name for w in find_weights(conv_net(), skip=["conv*"])] == ["up", "fc"]
    chosen = find_weights(conv_net(), only=["conv*", "fc"], skip=["conv2"])
    assert [w.name for w in chosen] == ["conv1", "fc"]
    assert chosen.skipped == ("conv2", "up")


@pytest.mark.parametrize("option", ["skip", "only"])
def test_a_glob_that_matches_nothing_is_refused(option: str) -> None:
    with pytest.raises(SettingError, match=naming(option, "'convv*'", 4, "ConvNet")):
        find_weights(conv_net(), **{option: ["conv*", "convv*"]})  # type: ignore[arg-type]


def test_skipping_everything_is_refused() -> None:
    with pytest.raises(SourceError, match="All 4 layers are skipped"):
        find_weights(conv_net(), skip=["*"])


def test_a_module_without_layers_is_refused() -> None:
    with pytest.raises(SourceError, match="no quantizable weights"):
        find_weights(nn.ReLU())


def test_dtypes_we_do_not_quantize_are_refused_by_name_unless_skipped() -> None:
    net = conv_net()
    net.fc.double()
    with pytest.raises(WeightError, match=r"layer 'fc': dtype torch\.float64"):
        find_weights(net)
    assert len(find_weights(net, skip=["fc"])) == 3


def test_parametrized_and_meta_weights_are_refused_by_name() -> None:
    net = conv_net()
    torch.nn.utils.parametrizations.weight_norm(net.fc)
    with pytest.raises(WeightError, match="layer 'fc'"):
        find_weights(net)
    with torch.device("meta"):
        lazy = nn.Linear(2, 2)
    with pytest.raises(WeightError, match="meta"):
        find_weights(lazy)


def weighing(weight: object) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    del net[0].weight
    if isinstance(weight, nn.Parameter):
        net[0].weight = weight
    else:
        vars(net[0])["weight"] = weight
    return net


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_what_is_kept_in_another_form_is_refused_by_name_unless_skipped() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    packed = torchao.IntxUnpackedToInt8Tensor.from_hp(torch.randn(4, 4), (1, 4), torch.int8)
    dense = torch.randn(4, 4)
    for weight, said in (
        (nn.Parameter(packed, requires_grad=False), r"quantized already.*\(IntxUnpackedToInt8Tensor\)"),
        (nn.Parameter(dense.to_sparse()), "kept as torch.sparse_coo.*to_dense"),
        (nn.Parameter(dense.to_sparse_csr()), "kept as torch.sparse_csr.*to_dense"),
        (nn.Parameter(dense.to(torch.complex64)), "dtype torch.complex64 is not allowed"),
        (nn.Parameter(dense.to(torch.float8_e4m3fn), requires_grad=False), "dtype torch.float8_e4m3fn is not allowed"),
        (nn.Parameter(dense.double()), "dtype torch.float64 is not allowed"),
        (dense, "no stored value to quantize"),
        (None, "no stored value to quantize"),
    ):
        net = weighing(weight)
        with pytest.raises(WeightError, match=f"layer '0'.*{said}.*skip the layer"):
            measure(net)
        table = measure(net, bits=[4], skip=["0"])
        assert [layer.name for layer in table.layers] == ["1"]
        assert table.skipped == ("0",)


def test_computed_weights_are_no_ties_of_one_another() -> None:
    net = nn.Sequential(*(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(8)))
    found = find_weights(net, refuse=False)
    assert [(weight.name, weight.tied) for weight in found] == [(str(number), ()) for number in range(8)]
    assert find_weights(net, skip=["3"], refuse=False).skipped == ("3",)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_an_error_naming_the_layer(bad: float) -> None:
    net = conv_net()
    with torch.no_grad():
        net.conv2.weight[3, 1, 0, 0] = bad
    with pytest.raises(WeightError, match="layer 'conv2': holds NaN or infinite weights"):
        measure(net)


def test_folding_a_file_is_refused(tmp_path: Path) -> None:
    save_model(conv_net(), str(tmp_path / "model.safetensors"))
    with pytest.raises(SettingError, match="fold_bn"):
        find_weights(tmp_path / "model.safetensors", fold_bn=True)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "shards", {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)})
    index = directory / INDEX_NAME
    index.write_text(index.read_text().replace("b.weight", "c.weight"))
    with pytest.raises(SourceError, match=r"lacks tensor 'c\.weight'"):
        find_weights(directory)


def test_the_imagenet_examples_checkpoint_is_read(tmp_path: Path) -> None:
    state = conv_net().state_dict()
    torch.save({"epoch": 1, "state_dict": state, "best_acc1": torch.tensor(71.2)}, tmp_path / "a.pth")
    torch.save({"model": {"state_dict": state}, "step": torch.tensor(3)}, tmp_path / "b.pth")
    assert len(find_weights(tmp_path / "a.pth")) == len(find_weights(tmp_path / "b.pth")) == 4


def test_a_tied_weight_is_skipped_under_either_name() -> None:
    assert find_weights(tied_net(), skip=["lm_head"]).skipped == ("embed",)
    assert [w.name for w in find_weights(tied_net(), only=["lm_head"])] == ["embed"]


def test_skipping_a_layer_that_cannot_be_quantized_goes_all_the_way() -> None:
    net = conv_net()
    torch.nn.utils.parametrizations.weight_norm(net.fc)
    net.conv2.double()
    plan = Uniform(bits=4)(measure(net, bits=(4,), skip=["fc", "conv2"], fold_bn=False))
    verify(apply(net, plan), plan, original=net)


def test_a_subclass_parameters_of_its_own_are_listed() -> None:
    class Lora(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.down = nn.Parameter(torch.zeros(8, 2))

    assert find_weights(Lora()).left_alone == (("down", "not the layer's weight"),)


def test_a_name_that_no_file_holds_is_refused() -> None:
    broken = nn.Sequential(OrderedDict({"a\ud800b": nn.Linear(8, 8), "fc": nn.Linear(8, 4)}))
    for call in (find_weights, measure):
        with pytest.raises(
            SourceError, match=r"Sequential: layer 'a\\ud800b' holds half a surrogate pair.*; rename it"
        ):
            call(broken)
    with pytest.raises(SourceError, match="surrogate"):
        find_weights(broken, skip=("a*",))
