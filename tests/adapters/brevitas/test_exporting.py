"""What a Brevitas model is written as: run by onnxruntime and TorchScript, widths read in the file, and saved whole."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from mpq_plugins import PTILMPQ, Affine, MixQuant, Plan, Uniform
from mpq_plugins.errors import FormatError, MismatchError, SettingError, SourceError, VerifyError
from tests.adapters import nets
from tests.adapters.brevitas.test_conversion import IMAGES, TOKENS, EveryKind, every_kind, planned
from tests.helpers.nets import tied_net

pytestmark = [
    pytest.mark.filterwarnings("ignore:Positional args are being deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated:DeprecationWarning"),
]
mpq_brevitas = pytest.importorskip("mpq_plugins.adapters.brevitas")
exporting = pytest.importorskip("mpq_plugins.adapters.brevitas.exporting")

SCHEMES = [Affine(granularity=g, symmetric=s) for g in ("per_channel", "per_tensor") for s in (False, True)]
PARTS = PTILMPQ(other_bits=(4, 1))


def onnx_run(path: Path, *inputs: Tensor) -> Tensor:
    """What onnxruntime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    # By default onnxruntime takes 8-bit inputs beside weights alone in a linear layer; 1 is float32.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (i.numpy() for i in inputs), strict=True)))[0])


def torch_run(path: Path, *inputs: Tensor) -> Tensor:
    logits: Tensor = torch.jit.load(str(path))(*inputs)
    return logits


RUN: dict[str, Callable[..., Tensor]] = {"torch_qcdq": torch_run, "onnx_qcdq": onnx_run}


@pytest.mark.parametrize(
    ("scheme", "allocator"),
    [*((SCHEMES[0], Uniform(bits=b)) for b in (8, 5, 2)), *((scheme, MixQuant(qem=3.0)) for scheme in SCHEMES)],
    ids=str,
)
@pytest.mark.parametrize("format", mpq_brevitas.FORMATS)
def test_what_is_written_is_the_model(format: str, scheme: Affine, allocator: Any, tmp_path: Path) -> None:
    model = every_kind(empty=True)
    plan = planned(model, scheme, allocator)
    quantized = mpq_brevitas.to_brevitas(model, plan)
    state = {name: value.clone() for name, value in quantized.state_dict().items()}
    assert mpq_brevitas.export(quantized, plan, tmp_path / "net", TOKENS, format=format) == (tmp_path / "net",)
    assert all(value.equal(state[name]) for name, value in quantized.state_dict().items())
    if format in RUN:
        with torch.no_grad():
            assert (RUN[format](tmp_path / "net", TOKENS) - quantized(TOKENS)).abs().max() <= 1e-5


def test_a_batch_may_have_another_size_than_the_example(tmp_path: Path) -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    quantized = mpq_brevitas.to_brevitas(model, plan)
    mpq_brevitas.export(quantized, plan, tmp_path / "net.onnx", IMAGES[:1])
    with torch.no_grad():
        assert torch.allclose(onnx_run(tmp_path / "net.onnx", IMAGES), quantized(IMAGES), atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("format", RUN)
def test_one_layer_with_quantized_inputs_is_the_same_in_every_runtime(
    format: str, scheme: Affine, tmp_path: Path
) -> None:
    """Deeper nets differ by a code here and there, for sums of floats depend on their order (see the journey)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3)).eval()
    plan = planned(model, scheme).with_activation_bits(8)
    quantized = mpq_brevitas.calibrate(mpq_brevitas.to_brevitas(model, plan), [IMAGES])
    mpq_brevitas.export(quantized, plan, tmp_path / "net", IMAGES, format=format)
    with torch.no_grad():
        assert (RUN[format](tmp_path / "net", IMAGES) - quantized(IMAGES)).abs().max() <= 1e-5


@pytest.mark.parametrize("allocator", [Uniform(bits=1), PARTS], ids=["binary", "parts"])
@pytest.mark.parametrize("scheme", SCHEMES[::3], ids=str)
@pytest.mark.parametrize("format", mpq_brevitas.FORMATS)
def test_what_a_format_cannot_hold_is_an_error_or_the_plan_beside(
    format: str, scheme: Affine, allocator: Any, tmp_path: Path
) -> None:
    model = every_kind(empty=True)
    plan = planned(model, scheme, allocator)
    quantized = mpq_brevitas.to_brevitas(model, plan)
    target = tmp_path / "net.file"
    holds = format == "qonnx" and allocator == Uniform(bits=1)
    if holds:
        mpq_brevitas.export(quantized, plan, target, TOKENS, format=format)
    else:
        why = (
            "has 1 bit and would be stated as 2" if allocator == Uniform(bits=1) else r"channels of 1, 4 bits|4, 1 bits"
        )
        with pytest.raises(SettingError, match=f"{format} cannot hold this plan's widths: .*({why}).*plan_beside=True"):
            mpq_brevitas.export(quantized, plan, target, TOKENS, format=format)
        assert list(tmp_path.iterdir()) == []
    beside = tmp_path / "net.plan.json"
    assert mpq_brevitas.export(quantized, plan, target, TOKENS, format=format, plan_beside=True) == (target, beside)
    assert Plan.load(beside) == plan
    if format in RUN:
        with torch.no_grad():
            assert (RUN[format](target, TOKENS) - quantized(TOKENS)).abs().max() <= 1e-5


def test_qonnx_states_the_plans_bits(tmp_path: Path) -> None:
    model = nets.made(EveryKind)
    bits = dict(zip(("embed", "conv1", "up1", "conv2", "up2", "conv3", "up3", "fc"), range(1, 9), strict=True))
    plan = planned(model, Affine(granularity="per_channel"))
    layers = tuple(layer.model_copy(update={"bits": bits[layer.name]}) for layer in plan.layers)
    plan = plan.model_copy(update={"layers": layers})
    mpq_brevitas.export(mpq_brevitas.to_brevitas(model, plan), plan, tmp_path / "net.onnx", TOKENS, format="qonnx")
    graph = onnx.load(str(tmp_path / "net.onnx")).graph
    stored = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    found = {
        node.input[0].removesuffix(".weight"): 1 if node.op_type == "BipolarQuant" else int(stored[node.input[3]])
        for node in graph.node
        if node.op_type in ("Quant", "BipolarQuant")
    }
    assert found == bits


@pytest.mark.parametrize(
    ("low", "high", "bits"),
    [(0, 255, 8), (-128, 127, 8), (-127, 127, 8), (0, 15, 4), (-7, 7, 4), (-1, 1, 2), (-2, 1, 2), (0, 3, 2)],
)
def test_bits_of_a_range(low: int, high: int, bits: int) -> None:
    assert exporting._bits(low, high) == bits


@pytest.mark.parametrize("format", mpq_brevitas.FORMATS)
def test_a_file_that_is_not_the_model_is_found_out(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    quantized = mpq_brevitas.to_brevitas(model, plan)
    target = tmp_path / "net"
    target.write_text("an older file")
    own = exporting._read
    for wrong, message in (
        (lambda weight: replace(weight, value=weight.value * 2), "'conv1' is not in the file as it is in the model"),
        (lambda weight: replace(weight, bits=weight.bits + 1), "'conv1' has 5 bits in the file, and not 4"),
    ):
        monkeypatch.setattr(exporting, "_read", lambda *file, wrong=wrong: map(wrong, own(*file)))
        with pytest.raises(VerifyError, match=message):
            mpq_brevitas.export(quantized, plan, target, IMAGES, format=format)
        assert target.read_text() == "an older file"
        assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"format": "tflite"}, "format: 'tflite' is not allowed; torch_qcdq, onnx_qcdq, qonnx")],
)
def test_export_refuses_settings(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    with pytest.raises(SettingError, match=message):
        mpq_brevitas.export(mpq_brevitas.to_brevitas(model, plan), plan, tmp_path / "n", IMAGES, **changes)


def test_export_refuses_groups_other_plans_and_what_cannot_run(tmp_path: Path) -> None:
    model = nets.made(nets.SmallNet)
    grouped = planned(model, Affine(granularity="per_group", group_size=2), skip=["conv1"])
    with pytest.raises(SettingError, match="onnx_qcdq has no scales per group: 'conv2', 'fc'"):
        mpq_brevitas.export(mpq_brevitas.to_brevitas(model, grouped), grouped, tmp_path / "n", IMAGES)
    plan = planned(model)
    quantized = mpq_brevitas.to_brevitas(model, plan)
    with pytest.raises(VerifyError, match="'conv1' has 4 bits, the plan 3"):
        mpq_brevitas.export(quantized, planned(model, allocator=Uniform(bits=3)), tmp_path / "n", IMAGES)
    with pytest.raises(SettingError, match="onnx_qcdq: SmallNet cannot be exported"):
        mpq_brevitas.export(quantized, plan, tmp_path / "n", torch.zeros(1, 5, 8, 8))
    with pytest.raises(SourceError, match="cannot write there"):
        mpq_brevitas.export(quantized, plan, tmp_path / "none" / "n", IMAGES)
    assert list(tmp_path.iterdir()) == []
    mpq_brevitas.export(quantized, plan, tmp_path / "n", IMAGES)  # a failure leaves nothing switched on


def tuned(model: nn.Module, plan: Plan, batch: Tensor) -> Any:
    quantized = mpq_brevitas.to_brevitas(model, plan)
    if plan.quantizes_inputs:
        quantized = mpq_brevitas.calibrate(quantized, [batch])
    quantized = mpq_brevitas.correct_bias(quantized, [batch])
    return mpq_brevitas.train(quantized, [batch], lambda model, batch: model(batch).square().mean(), epochs=2)


@pytest.mark.parametrize(
    ("scheme", "activation_bits"),
    [*zip(SCHEMES, (None, 6, None, 6), strict=True), (Affine(granularity="per_group", group_size=2), 6)],
    ids=str,
)
def test_a_saved_model_comes_back(scheme: Affine, activation_bits: int | None, tmp_path: Path) -> None:
    model = every_kind()
    skip = ["conv2", "fc", "up1"] if scheme.group_size else []
    plan = planned(model, scheme, PARTS, skip=skip).with_activation_bits(activation_bits)
    quantized = tuned(model, plan, TOKENS)
    mpq_brevitas.save(quantized, plan, tmp_path / "net.safetensors")
    torch.manual_seed(5)
    loaded = mpq_brevitas.load(tmp_path / "net.safetensors", EveryKind(), plan)
    mpq_brevitas.verify_tuned(loaded, plan)
    with torch.no_grad():
        assert loaded(TOKENS).equal(quantized(TOKENS))


def test_ties_and_ternary_layers_come_back(tmp_path: Path) -> None:
    model = tied_net()
    plan = planned(model, Affine(symmetric=True), Uniform(bits=2))
    quantized = mpq_brevitas.to_brevitas(model, plan, ternary=["block"])
    mpq_brevitas.save(quantized, plan, tmp_path / "net.safetensors")
    loaded = mpq_brevitas.load(tmp_path / "net.safetensors", tied_net())
    assert mpq_brevitas.verify(loaded, plan, model) == mpq_brevitas.verify(quantized, plan, model, batch=TOKENS)
    assert loaded.lm_head.weight is loaded.embed.weight


def test_trained_scales_of_tied_weights_come_back(tmp_path: Path) -> None:
    model = tied_net()
    plan = planned(model)
    quantized = mpq_brevitas.train(
        mpq_brevitas.to_brevitas(model, plan), [TOKENS], lambda net, batch: net(batch).square().mean(), lr=0.1
    )
    mpq_brevitas.save(quantized, plan, tmp_path / "net.safetensors")
    loaded = mpq_brevitas.load(tmp_path / "net.safetensors", tied_net())
    with torch.no_grad():
        assert loaded(TOKENS).equal(quantized(TOKENS))


@pytest.mark.parametrize(
    ("plan", "ternary", "message"),
    [
        ("{", "[]", "no JSON"),
        (None, "xx", "no JSON"),
        (None, "5", "no list of names"),
        ("5", "[]", "not a plan|object"),
    ],
)
def test_a_damaged_file_is_told(plan: str | None, ternary: str, message: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = nets.made(nets.SmallNet)
    stored = planned(model).to_json() if plan is None else plan
    metadata = {"format": "mpq-brevitas", "plan": stored, "ternary": ternary}
    save_file({"weight": torch.zeros(2)}, tmp_path / "net.safetensors", metadata)
    with pytest.raises(FormatError, match=message):
        mpq_brevitas.load(tmp_path / "net.safetensors", model)


class Odd(nets.SmallNet):
    """Keeps something in its state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"answer": 42}

    def set_extra_state(self, state: Any) -> None:
        """Nothing."""


def test_state_that_is_no_tensor_is_not_saved(tmp_path: Path) -> None:
    model = nets.made(Odd)
    plan = planned(model)
    with pytest.raises(SettingError, match="'_extra_state' in the state dict are no tensors"):
        mpq_brevitas.save(mpq_brevitas.to_brevitas(model, plan), plan, tmp_path / "net.safetensors")


@pytest.mark.parametrize("format", mpq_brevitas.FORMATS)
def test_input_bits_are_read_in_the_file(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model).with_activation_bits(6)
    quantized = mpq_brevitas.calibrate(mpq_brevitas.to_brevitas(model, plan), [IMAGES])
    mpq_brevitas.export(quantized, plan, tmp_path / "net", IMAGES, format=format)
    own = exporting._read_activations
    parse = exporting._torch_graph if format == "torch_qcdq" else exporting._onnx_graph
    written = parse(tmp_path / "net")
    assert list(own(written, format)) == [6, 6, 6]
    for wrong in (lambda found: [8, *found[1:]], lambda found: found[1:]):
        monkeypatch.setattr(exporting, "_read_activations", lambda *file, wrong=wrong: wrong(list(own(*file))))
        with pytest.raises(VerifyError, match="the model those of 3 layers, to"):
            mpq_brevitas.export(quantized, plan, tmp_path / "other", IMAGES, format=format)


@pytest.mark.parametrize("format", mpq_brevitas.FORMATS)
def test_a_traced_model_can_be_exported(format: str, tmp_path: Path) -> None:
    model = torch.fx.symbolic_trace(nets.made(nets.SmallNet))
    plan = planned(model)
    quantized = mpq_brevitas.to_brevitas(model, plan)
    mpq_brevitas.export(quantized, plan, tmp_path / "net", IMAGES, format=format)


def test_a_saved_model_is_not_loaded_into_another_plan_or_network(tmp_path: Path) -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    path = tmp_path / "net.safetensors"
    mpq_brevitas.save(mpq_brevitas.to_brevitas(model, plan), plan, path)
    with pytest.raises(MismatchError, match=r"quantized by another plan: layers 'conv1', 'conv2', 'fc' differ"):
        mpq_brevitas.load(path, model, planned(model, allocator=Uniform(bits=3)))
    with pytest.raises(MismatchError, match="by another plan: the layers agree, what else it says does not"):
        mpq_brevitas.load(path, model, plan.model_copy(update={"rest_bytes": 7}))
    with pytest.raises(MismatchError, match=r"quantized by another plan: layers 'conv1', 'conv2', 'fc' differ"):
        mpq_brevitas.load(path, model, plan.with_activation_bits(8))
    with pytest.raises(MismatchError, match="made for another model"):
        mpq_brevitas.load(path, tied_net())
    wider = nets.made(nets.SmallNet)
    wider.extra = nn.BatchNorm2d(3)
    with pytest.raises(MismatchError, match=r"another network than SmallNet.*extra"):
        mpq_brevitas.load(path, wider)


def test_a_model_that_does_not_hold_the_plan_is_not_saved(tmp_path: Path) -> None:
    model = nets.made(nets.SmallNet)
    quantized = mpq_brevitas.to_brevitas(model, planned(model))
    with pytest.raises(VerifyError, match="'conv1' has 4 bits, the plan 5"):
        mpq_brevitas.save(quantized, planned(model, allocator=Uniform(bits=5)), tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no such thing", None])
def test_other_files_are_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormatError, match=r"cannot read it .*brevitas.save"):
        mpq_brevitas.load(path, nets.made(nets.SmallNet))


def test_a_file_without_a_plan_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "net.safetensors")
    with pytest.raises(FormatError, match="carries no plan"):
        mpq_brevitas.load(tmp_path / "net.safetensors", nets.made(nets.SmallNet))
