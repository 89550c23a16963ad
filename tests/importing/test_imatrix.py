"""Importance matrices of llama.cpp: the weighted error against a slow loop, names, experts, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from mpq_plugins import Affine, Budget, LayerTable, TypeTable, import_imatrix, measure, measure_types, sensitivity
from mpq_plugins.errors import FormatError, MismatchError, MPQError, SettingError
from mpq_plugins.quantization.quantize import fake_quantize
from tests.conftest import Ran
from tests.helpers.ggufs import tiny, write_gguf
from tests.helpers.imatrices import write_imatrix

pytestmark = pytest.mark.usefixtures("one_thread")

ME = __name__
Mpq = Callable[..., Ran]
PER_CHANNEL = Affine(granularity="per_channel")
BITS = (2, 4, 8)
SAMPLES, POSITIONS = 3, 5


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8)).eval()


def batches() -> list[Tensor]:
    """One input column matters a hundred times as much as another."""
    spread = torch.linspace(0.1, 10, 64)
    drawn = [torch.randn(1, POSITIONS, 64, generator=torch.Generator().manual_seed(n)) for n in range(SAMPLES)]
    return [batch * spread for batch in drawn]


def seen(model: nn.Module) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """What llama-imatrix would keep of the same inputs."""
    inputs: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    for batch in batches():
        x = batch[0]
        for name, module in model.named_children():
            if isinstance(module, nn.Linear):
                sums, count = inputs.get(f"{name}.weight", (np.zeros(x.shape[1]), np.zeros(1)))
                squares = x.double().square().sum(0).numpy()
                inputs[f"{name}.weight"] = (sums + squares, count + len(x))
            x = module(x).detach()
    return inputs


def slow(weight: NDArray[Any], rounded: NDArray[Any], counts: NDArray[Any]) -> list[float]:
    """sum_j h_j (w - w')_cj^2 of every row, one weight at a time."""
    rows, columns = weight.shape
    return [
        sum(float(counts[j]) * (float(weight[c, j]) - float(rounded[c, j])) ** 2 for j in range(columns))
        for c in range(rows)
    ]


@pytest.mark.parametrize("scheme", [PER_CHANNEL, Affine(), Affine(granularity="per_group", group_size=16)])
def test_errors_are_weighted_as_a_slow_loop_weighs_them(tmp_path: Path, scheme: Affine) -> None:
    model, inputs = net(), seen(net())
    table = import_imatrix(write_imatrix(tmp_path / "i.gguf", inputs), measure(model, scheme, BITS), model)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    for layer in table.layers:
        sums, count = inputs[f"{layer.name}.weight"]
        weight = weights[f"{layer.name}.weight"]
        for k, bits in enumerate(BITS):
            rounded = fake_quantize(weight, bits, scheme)
            expected = slow(weight.numpy(), rounded.numpy(), np.float32(sums) / count)
            np.testing.assert_allclose(layer.channel_sensitivities["output_mse"][k], expected, rtol=1e-6)
            np.testing.assert_allclose(layer.sensitivities["output_mse"][k], sum(expected), rtol=1e-6)


def test_it_is_what_the_same_inputs_give_by_running_the_model(tmp_path: Path) -> None:
    model = net()
    table = measure(model, PER_CHANNEL, BITS)
    imported = import_imatrix(write_imatrix(tmp_path / "i.gguf", seen(model), POSITIONS), table, model)
    run = sensitivity(model, table, "output_mse", batches())
    for ours, theirs in zip(imported.layers, run.layers, strict=True):
        np.testing.assert_allclose(
            ours.channel_sensitivities["output_mse"], theirs.channel_sensitivities["output_mse"], rtol=1e-5
        )
    budget = Budget(average_bits=4, bits=BITS, sensitivity="output_mse")
    assert budget(imported).layers == budget(run).layers
    assert {name: bits for name, bits in vars(imported).items() if name != "layers"} == {
        name: bits for name, bits in vars(table).items() if name != "layers"
    }


def test_every_type_of_a_table_of_types_is_filled(tmp_path: Path) -> None:
    model = net()
    types = measure_types(model, ("int4", "int8", "mxfp4"))
    path = write_imatrix(tmp_path / "i.gguf", seen(model), POSITIONS)
    imported, run = import_imatrix(path, types, model), sensitivity(model, types, "output_mse", batches())
    for ours, theirs in zip(imported.columns, run.columns, strict=True):
        assert list(ours.by_name) == list(theirs.by_name)
        for name, layer in ours.by_name.items():
            expected = theirs.by_name[name].sensitivities["output_mse"]
            np.testing.assert_allclose(layer.sensitivities["output_mse"], expected, rtol=1e-5)
    budget = Budget(total_average_bits=7, sensitivity="output_mse")
    assert budget(imported).layers == budget(run).layers
    imported.save(tmp_path / "t.mpqt")
    again = TypeTable.load(tmp_path / "t.mpqt")
    assert again.columns[0].table.sensitivities == ("output_mse",)


@given(st.floats(1e-3, 1e3), st.integers(1, 512))
@settings(max_examples=15, deadline=None)
def test_twice_the_text_of_the_same_kind_says_the_same(
    tmp_path_factory: pytest.TempPathFactory, factor: float, chunk: int
) -> None:
    model, inputs = net(), seen(net())
    table, place = measure(model, PER_CHANNEL, BITS), tmp_path_factory.mktemp("i")
    longer = {name: (sums * factor, counts * factor) for name, (sums, counts) in inputs.items()}
    one = import_imatrix(write_imatrix(place / "a.gguf", inputs, chunk), table, model)
    other = import_imatrix(write_imatrix(place / "b.gguf", longer, chunk), table, model)
    for a, b in zip(one.layers, other.layers, strict=True):
        np.testing.assert_allclose(a.sensitivities["output_mse"], b.sensitivities["output_mse"], rtol=1e-5)


def llama(directory: Path) -> Path:
    """A checkpoint of transformers' names, of one block with three experts' worth of names left out."""
    directory.mkdir()
    block = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (40, 64), f"{block}.self_attn.q_proj.weight": (64, 64),
        f"{block}.block_sparse_moe.experts.0.w1.weight": (96, 64),
        f"{block}.block_sparse_moe.experts.1.w1.weight": (96, 64), "lm_head.weight": (40, 64),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        directory / "model.safetensors",
    )
    config = {"model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": 64}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def of_llama(counts: tuple[float, float] = (6, 4)) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    columns = np.arange(1, 65)
    return {
        "blk.0.attn_q.weight": (columns, np.array([8.0])),
        "blk.0.ffn_gate_exps.weight": (np.stack([columns * 2, columns * 3]), np.array(counts)),
    }


IN_FLOAT = ("lm_head", "model.embed_tokens")


def test_layers_of_transformers_are_found_by_ggufs_names_and_experts_by_their_numbers(tmp_path: Path) -> None:
    source = llama(tmp_path / "m")
    table = measure(source, PER_CHANNEL, BITS)
    imported = import_imatrix(write_imatrix(tmp_path / "i.gguf", of_llama()), table, source, skip=IN_FLOAT)
    from safetensors.torch import load_file

    weights = load_file(source / "model.safetensors")
    columns = np.arange(1, 65)
    # An expert's error is in the output at the positions that reached it alone, of 8 in all.
    counts = {"q_proj": columns / 8, "experts.0.w1": columns * 2 / 8, "experts.1.w1": columns * 3 / 8}
    assert len(imported.layers) == 3
    for layer in imported.layers:
        ((_, h),) = [(end, value) for end, value in counts.items() if layer.name.endswith(end)]
        weight = weights[f"{layer.name}.weight"]
        expected = slow(weight.numpy(), fake_quantize(weight, 2, PER_CHANNEL).numpy(), h)
        np.testing.assert_allclose(layer.channel_sensitivities["output_mse"][0], expected, rtol=1e-6)


def test_a_table_without_some_layers_is_that_of_a_measurement_that_skipped_them(tmp_path: Path) -> None:
    source = llama(tmp_path / "m")
    path = write_imatrix(tmp_path / "i.gguf", of_llama())
    imported = import_imatrix(path, measure(source, PER_CHANNEL, BITS), source, skip=IN_FLOAT)
    skipped = measure(source, PER_CHANNEL, BITS, skip=IN_FLOAT)
    assert imported.fingerprint == skipped.fingerprint
    assert imported.rest_bytes == skipped.rest_bytes
    assert sorted(imported.skipped) == sorted(skipped.skipped)
    assert [layer.name for layer in imported.layers] == [layer.name for layer in skipped.layers]


def test_a_gguf_source_has_the_files_own_names(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", tiny())
    table = measure(source, PER_CHANNEL, BITS, skip=["token_embd"])
    inputs = {f"{layer.name}.weight": (np.ones(layer.shape[1]), np.ones(1)) for layer in table.layers}
    imported = import_imatrix(write_imatrix(tmp_path / "i.gguf", inputs), table, source)
    for layer in imported.layers:  # all inputs alike: the squared error itself
        expected = layer.errors["mse"] * layer.numel
        np.testing.assert_allclose(layer.sensitivities["output_mse"], expected, rtol=1e-5)


def test_ggmls_types_are_weighed_as_they_were_measured(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", tiny())
    table = measure_types(source, ("q4_0", "q8_0", "q4_k"), skip=["token_embd"])
    inputs = {f"{layer.name}.weight": (np.ones(layer.shape[1]), np.ones(1)) for layer in table.base.layers}
    imported = import_imatrix(write_imatrix(tmp_path / "i.gguf", inputs), table, source)
    assert [len(column.table.layers) for column in imported.columns] == [7, 7, 1]  # rows of 256 in one alone
    for column in imported.columns:
        for layer in column.table.layers:
            expected = layer.errors["mse"] * layer.numel
            np.testing.assert_allclose(layer.sensitivities["output_mse"], expected, rtol=1e-5)


def changed(inputs: dict[str, Any], **tensors: Any) -> dict[str, Any]:
    return {name: value for name, value in {**inputs, **tensors}.items() if value is not None}


@pytest.mark.parametrize(
    ("other", "error", "said"),
    [
        ({"0.weight": None, "2.weight": None}, SettingError, "says nothing of '0', '2'"),
        ({"0.weight": (np.ones(64), np.zeros(1))}, SettingError, "never reached '0'"),
        ({"0.weight": (np.ones(63), np.ones(1))}, MismatchError, "layer '0': has 64 inputs"),
        ({"0.weight": (np.full(64, np.nan), np.ones(1))}, FormatError, "0.weight.in_sum2 has values"),
        ({"0.weight": (-np.ones(64), np.ones(1))}, FormatError, "negative"),
        ({"0.weight": (np.ones((2, 64)), np.ones(3))}, FormatError, "of 2 matrices, and 0.weight.counts of 3"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, other: dict[str, Any], error: type[MPQError], said: str
) -> None:
    model = net()
    path = write_imatrix(tmp_path / "i.gguf", changed(seen(model), **other))
    with pytest.raises(error, match=said):
        import_imatrix(path, measure(model, PER_CHANNEL, BITS), model)


def test_another_models_weights_are_refused(tmp_path: Path) -> None:
    table, path = measure(net(), PER_CHANNEL, BITS), write_imatrix(tmp_path / "i.gguf", seen(net()))
    other = net()
    with torch.no_grad():
        other[0].weight[0, 0] += 5.0  # type: ignore[index]  # a Sequential
    with pytest.raises(MismatchError, match="other weights"):
        import_imatrix(path, table, other)


def test_files_that_are_no_importance_matrix_are_refused(tmp_path: Path) -> None:
    model = net()
    table = measure(model, PER_CHANNEL, BITS)
    with pytest.raises(FormatError, match="no importance matrix"):
        import_imatrix(write_gguf(tmp_path / "m.gguf", tiny()), table, model)
    old = tmp_path / "old.dat"
    old.write_bytes((1).to_bytes(4, "little") + (11).to_bytes(4, "little") + b"blk.0.ffn_x" + bytes(40))
    with pytest.raises(FormatError, match="llama-imatrix --in-file"):
        import_imatrix(old, table, model)


def test_a_matrix_that_is_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    model = net()
    table = measure(model, PER_CHANNEL, BITS)
    whole = write_imatrix(tmp_path / "i.gguf", seen(model)).read_bytes()
    for length in range(0, len(whole) - 64, 37):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(MPQError):
            import_imatrix(tmp_path / "cut.gguf", table, model)


def test_the_journey_on_the_command_line(tmp_path: Path, mpq: Mpq) -> None:
    path = write_imatrix(tmp_path / "i.gguf", seen(net()), POSITIONS)
    measured = ("measure", f"{ME}:net")
    assert mpq(*measured, "-o", tmp_path / "t.mpqt").code == 0
    ran = mpq("import", path, "--onto", tmp_path / "t.mpqt", "--source", f"{ME}:net", "-o", tmp_path / "w.mpqt")
    assert (ran.code, "3 layers with output_mse" in ran.out) == (0, True)
    words = ("--sensitivity", "output_mse", "--calibrate", f"{ME}:batches")
    assert mpq(*measured, *words, "-o", tmp_path / "r.mpqt").code == 0
    for table, plan in (("w", "a"), ("r", "b")):
        limit = ("--average-bits", "4", "--sensitivity", "output_mse")
        assert mpq("plan", tmp_path / f"{table}.mpqt", *limit, "-o", tmp_path / f"{plan}.json").code == 0
    plans = [json.loads((tmp_path / f"{plan}.json").read_text())["layers"] for plan in "ab"]
    assert plans[0] == plans[1]
    assert any("parts" in layer for layer in plans[0])  # no plan of one width


def test_what_is_refused_on_the_command_line_leaves_no_file(tmp_path: Path, mpq: Mpq) -> None:
    measure(net(), PER_CHANNEL, BITS).save(tmp_path / "t.mpqt")
    path = write_imatrix(tmp_path / "i.gguf", changed(seen(net()), **{"0.weight": None}))
    table, out = tmp_path / "t.mpqt", tmp_path / "w.mpqt"
    source = ("--source", f"{ME}:net")
    for words, said in (
        (("--onto", table, *source), "--skip '0'"),
        (("--onto", table), "--source SOURCE: a file of imatrix needs it"),
        (source, "--onto TABLE: a file of imatrix needs it"),
        (("--onto", table, "--source", table), "is a table, and the weights"),
        (("--onto", tmp_path / "none.mpqt", *source), "none.mpqt"),
    ):
        ran = mpq("import", path, *words, "-o", out)
        assert ran.code == 2
        assert said in ran.err
        assert ran.err.count("\n") == 1
        assert not out.exists()
    ran = mpq("import", path, "--onto", table, *source, "--skip", "0", "-o", out, "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["layers"] == 2
    assert LayerTable.load(out).skipped == ("0",)
