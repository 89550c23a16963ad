"""The table against the slow loop, its options, and its accounting of work."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpq_plugins import Affine, LayerTable, measure
from mpq_plugins.errors import MeasureWarning, SettingError
from mpq_plugins.plans.stats import METRICS
from mpq_plugins.quantization import kernel
from mpq_plugins.quantization.affine import quantize
from mpq_plugins.quantization.quantize import fake_quantize
from mpq_plugins.weights import chunks
from tests.helpers.nets import ConvNet, conv_net, tied_net
from tests.quantization import oracle

SCHEMES = [
    Affine(),
    Affine(symmetric=True),
    Affine(granularity="per_channel"),
    Affine(granularity="per_channel", symmetric=True, range="mse"),
    Affine(range="mse"),
    Affine(symmetric="full", granularity="per_channel", range="mse"),
    Affine(symmetric="full", scale_dtype="float16"),
    Affine(range="percentile", share=0.9),
    Affine(symmetric="full", granularity="per_channel", range="kl"),
]


@pytest.fixture(params=["numba", "torch"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernel, "numba_available", lambda: request.param == "numba")
    return str(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("chunk", [1 << 21, 40])
def test_errors_are_those_of_the_fake_quantized_weights(
    route: str, scheme: Affine, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK", chunk)  # 40 weights: several chunks even in a small layer
    net = conv_net()
    table = measure(net, scheme, range(1, 9), METRICS, per_channel=True, fold_bn=False)
    for layer in table.layers:
        weight = net.get_submodule(layer.name).weight
        assert isinstance(weight, Tensor)
        for position, bits in enumerate(table.bits):
            pairs = (
                weight.movedim(layer.channel_axis, 0).flatten(1).tolist(),
                exact(weight, bits, scheme, layer.channel_axis),
            )
            flat = [list(itertools.chain(*rows)) for rows in pairs]
            for metric in METRICS:
                whole = oracle.error(flat[0], flat[1], metric)
                np.testing.assert_allclose(layer.errors[metric][position], whole, rtol=1e-5, atol=1e-12)
                rows = [oracle.error(w, q, metric) for w, q in zip(*pairs, strict=True)]
                np.testing.assert_allclose(layer.channel_errors[metric][position], rows, rtol=1e-5, atol=1e-12)


def exact(weight: Tensor, bits: int, scheme: Affine, axis: int) -> list[list[float]]:
    """(code - zero_point) * scale by output channel, in exact arithmetic: not rounded to float32."""
    quantized = quantize(weight, bits, scheme, channel_axis=axis)
    codes = quantized.codes.movedim(axis, 0).flatten(1)
    scale, zero = (values[:, 0].astype(float) for values in (quantized.grid.scale, quantized.grid.zero_point))
    per_row = np.broadcast_to(scale, len(codes)), np.broadcast_to(zero, len(codes))
    return [[(c - z) * s for c in row] for row, s, z in zip(codes.tolist(), *per_row, strict=True)]


def test_groups_are_measured_by_group(route: str) -> None:
    net = nn.Linear(12, 5)
    scheme = Affine(granularity="per_group", group_size=4)
    table = measure(net, scheme, (3,), ("mse",), per_channel=True)
    quantized = fake_quantize(net.weight, 3, scheme)
    expected = (quantized - net.weight).double().square().mean(dim=1).detach().numpy()
    np.testing.assert_allclose(table.channel_error(table.layers[0], "mse", 3), expected, rtol=1e-5)


def test_importances_are_the_papers_norms() -> None:
    net = conv_net()
    for layer in measure(net, fold_bn=False).layers:
        weight = net.get_submodule(layer.name).weight
        assert isinstance(weight, Tensor)
        rows = weight.double().movedim(layer.channel_axis, 0).flatten(1)
        np.testing.assert_allclose(layer.importance, rows.abs().sum().item(), rtol=1e-12)
        np.testing.assert_allclose(layer.channel_importance, rows.norm(dim=1).detach().numpy(), rtol=1e-12)


@pytest.mark.slow
def test_macs_are_counted_for_an_example_input() -> None:
    table = measure(conv_net(), example_input=torch.zeros(2, 3, 8, 8))
    assert {layer.name: layer.macs for layer in table.layers} == {
        "conv1": 2 * 8 * 64 * 27,
        "conv2": 2 * 12 * 64 * 36,
        "up": 2 * 64 * 12 * 6 * 4,
        "fc": 2 * 6 * 10,
    }
    assert measure(conv_net()).layers[0].macs is None
    tied = measure(tied_net(), example_input=torch.zeros(1, 3, dtype=torch.long))
    assert {layer.name: layer.macs for layer in tied.layers} == {"embed": 3 * 8 * 20, "block": 2 * 3 * 64}


def test_fused_paths_do_not_hide_macs() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    table = measure(layer, example_input=torch.zeros(1, 5, 8))
    assert {s.name: s.macs for s in table.layers} == {"self_attn.out_proj": None, "linear1": 640, "linear2": 640}


def test_counting_macs_leaves_the_model_as_it_was() -> None:
    net = conv_net().train()
    net.bn2.eval()
    mean = net.bn1.running_mean
    assert mean is not None
    before = mean.clone()
    with pytest.warns(MeasureWarning, match=r"in training mode \('bn1'\)"):
        table = measure(net, example_input=torch.ones(2, 3, 8, 8))
    assert table.fold_bn  # by bn2, which is in evaluation mode
    with pytest.raises(SettingError, match=r"call model\.eval"):
        measure(net, fold_bn=True)
    assert net.training
    assert not net.bn2.training
    assert mean.equal(before)


def test_a_wrong_example_input_is_refused() -> None:
    with pytest.raises(SettingError, match="example_input: ConvNet does not run on it"):
        measure(conv_net(), example_input=torch.zeros(2, 4, 8, 8))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, scheme: Affine, per_channel: bool) -> None:
    table = measure(
        conv_net(), scheme, (2, 8), METRICS, per_channel=per_channel, skip=["fc"], example_input=torch.zeros(1, 3, 8, 8)
    )
    table.save(tmp_path / "net.mpqt")
    loaded = LayerTable.load(tmp_path / "net.mpqt")
    for ours, theirs in zip(table.layers, loaded.layers, strict=True):
        assert ours.channel_importance.tolist() == theirs.channel_importance.tolist()
        for metric in METRICS:
            assert ours.errors[metric].tolist() == theirs.errors[metric].tolist()
            if per_channel:
                assert ours.channel_errors[metric].tolist() == theirs.channel_errors[metric].tolist()
        plain = ("name", "kind", "shape", "channel_axis", "importance", "macs", "tied")
        assert [getattr(ours, f) for f in plain] == [getattr(theirs, f) for f in plain]
    header = ("scheme", "bits", "metrics", "fold_bn", "fingerprint", "skipped", "left_alone")
    assert [getattr(table, f) for f in header] == [getattr(loaded, f) for f in header]


def test_a_file_and_its_module_give_the_same_table(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    ours, file = measure(net), measure(tmp_path / "net.safetensors")
    assert ours.fingerprint == file.fingerprint
    for a, b in zip(ours.layers, file.layers, strict=True):
        assert a.errors["relative"].tolist() == b.errors["relative"].tolist()


def test_progress_has_a_total() -> None:
    seen: list[tuple[str, int, int]] = []
    measure(conv_net(), progress=lambda *step: seen.append(step))
    total = sum(p.numel() for n, p in conv_net().named_parameters() if n in WEIGHTS)
    assert seen[0] == ("conv1", 0, total)
    assert seen[-1] == ("", total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


WEIGHTS = ("conv1.weight", "conv2.weight", "up.weight", "fc.weight")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (0,)}, "bits: 0 is not allowed; 1 to 8"),
        ({"bits": (9,)}, "bits: 9 is not allowed"),
        ({"bits": ()}, r"bits: \(\) is not allowed; a list"),
        ({"bits": 4}, "bits: 4 is not allowed; a list"),
        ({"metrics": ("rms",)}, "metrics: 'rms' is not allowed; relative, mse"),
        ({"metrics": ()}, "metrics: none given"),
        ({"fold_bn": "maybe"}, "fold_bn: 'maybe' is not allowed"),
    ],
)
def test_bad_requests_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        measure(conv_net(), **options)


def test_asking_for_what_was_not_measured_says_what_was() -> None:
    table = measure(conv_net(), bits=(4, 8), metrics=("mse",))
    with pytest.raises(SettingError, match="this table has 4, 8"):
        table.error(table.layers[0], "mse", 3)
    with pytest.raises(SettingError, match="this table has mse"):
        table.error(table.layers[0], "relative", 4)
    with pytest.raises(SettingError, match="no errors per channel"):
        table.channel_error(table.layers[0], "mse", 4)


def test_the_weights_are_not_touched() -> None:
    net = conv_net()
    measure(net, Affine(range="mse"))
    fresh = conv_net()
    assert isinstance(net, ConvNet)
    assert all(a.equal(b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("scheme", [Affine(), Affine(granularity="per_channel"), Affine(range="mse")])
def test_the_table_does_not_depend_on_the_number_of_threads(scheme: Affine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 40)
    tables = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            tables.append(measure(conv_net(), scheme, per_channel=True))
    finally:
        torch.set_num_threads(threads)
    first, *others = tables
    for other in others:
        for ours, theirs in zip(first.layers, other.layers, strict=True):
            assert ours.name == theirs.name
            assert ours.errors["mse"].tolist() == theirs.errors["mse"].tolist()
            assert ours.channel_errors["relative"].tolist() == theirs.channel_errors["relative"].tolist()


class LowRank(nn.Linear):
    """A layer with a low-rank branch of layers of its own."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) + self.up(self.down(x))
        return y


def test_a_layer_does_not_count_what_layers_inside_it_multiply() -> None:
    table = measure(nn.Sequential(LowRank()), example_input=torch.ones(1, 8))
    assert {layer.name: layer.macs for layer in table.layers} == {"0": 48, "0.down": 16, "0.up": 12}
