"""Plans on the pretrained ResNet-20 through Brevitas, as a user goes: convert, tune, verify, export, save, load."""

import copy
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.cifar_resnet import ResNet, evaluate, images, resnet
from mpq_plugins import PTILMPQ, Affine, LayerTable, MixQuant, Plan, Uniform, apply, measure
from mpq_plugins.models.kinds import quantizable_weights

pytestmark = [
    pytest.mark.usefixtures("zoo"),
    pytest.mark.filterwarnings("ignore:Positional args are being deprecated:FutureWarning"),
]
brevitas = pytest.importorskip("mpq_plugins.adapters.brevitas")
reading = pytest.importorskip("mpq_plugins.adapters.brevitas.read")

ABOUT_THREE_BITS = MixQuant(qem=14.0)


@cache
def table(granularity: Any) -> LayerTable:
    return measure(resnet(20), Affine(granularity=granularity), range(1, 9))


def calibration(count: int = 256) -> list[Tensor]:
    return list(images("calib_1024.npz")[0][:count].split(128))


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_weights_are_our_fake_quantization_to_the_bit(granularity: str) -> None:
    net = resnet(20)
    uniform = [Uniform(bits=b) for b in range(8, 0, -1)]
    allocators: list[Any] = [*uniform, MixQuant(qem=2.0), ABOUT_THREE_BITS, PTILMPQ()]
    for allocator in allocators:
        plan: Plan = allocator(table(granularity))
        quantized, ours = brevitas.to_brevitas(net, plan), quantizable_weights(apply(net, plan))
        assert len(brevitas.verify(quantized, plan, net)) == 20
        for name, weight in ours.items():
            value = reading.weight_codes(quantized.get_submodule(name)).value
            assert value.reshape(weight.shape).equal(weight)


def test_gptq_and_learned_rounding_recover_at_least_half(tmp_path: Path) -> None:
    net, data = resnet(20), tuple(part[:300] for part in images())
    plan = ABOUT_THREE_BITS(table("per_channel"))
    assert 2.8 < plan.size().average_bits < 3.0
    exact, _ = evaluate(net, *data)
    plain = brevitas.to_brevitas(net, plan)
    lost, loss = evaluate(plain, *data)
    assert exact - lost > 15
    before = [reading.weight_codes(plain.get_submodule(layer.name)).codes for layer in plan.layers]
    for tune in (brevitas.gptq, lambda model, batches: brevitas.learned_round(model, batches, steps=60)):
        tuned = tune(plain, calibration()[:2])
        brevitas.verify_tuned(tuned, plan)
        changed = [
            not reading.weight_codes(tuned.get_submodule(layer.name)).codes.equal(codes)
            for layer, codes in zip(plan.layers, before, strict=True)
        ]
        assert all(changed)
        reached, better = evaluate(tuned, *data)
        assert better < loss
        assert reached >= (exact + lost) / 2
    path = tmp_path / "net.safetensors"
    brevitas.save(tuned, plan, path)
    assert evaluate(brevitas.load(path, ResNet(3), plan), *data) == evaluate(tuned, *data)


def onnx_run(path: Path, inputs: Tensor) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])


@pytest.mark.parametrize("allocator", [Uniform(bits=4), MixQuant(qem=2.0), PTILMPQ()], ids=lambda value: value.name)
def test_weights_alone_run_in_onnxruntime_as_in_torch(allocator: Any, tmp_path: Path) -> None:
    net, inputs = resnet(20), images()[0][:128]
    plan = allocator(table("per_channel"))
    quantized = brevitas.to_brevitas(net, plan)
    parts = any(layer.bits is None for layer in plan.layers)
    path, *_ = brevitas.export(quantized, plan, tmp_path / "net.onnx", inputs[:1], plan_beside=parts)
    with torch.no_grad():
        assert (onnx_run(path, inputs) - quantized(inputs)).abs().max() <= 1e-4


def input_codes(quantized: Any, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the codes of every layer's input."""
    codes: list[Tensor] = []
    hooks = [
        module.input_quant.register_forward_hook(lambda _, __, output: codes.append(output.int()))
        for module in quantized.modules()
        if reading.is_quantized(module)
    ]
    with torch.no_grad():
        logits = quantized(inputs)
    for hook in hooks:
        hook.remove()
    return logits, codes


def test_quantized_activations_differ_between_runtimes_by_what_float32_leaves_open(tmp_path: Path) -> None:
    """The order in which float32 sums are taken decides near ties, and a code that flips flips others after it."""
    net, inputs = resnet(20), images()[0][:128]
    plan = Uniform(bits=8)(table("per_channel")).with_activation_bits(8)
    quantized = brevitas.calibrate(brevitas.to_brevitas(net, plan), calibration())
    logits, codes = input_codes(quantized, inputs)
    exact, exact_codes = input_codes(copy.deepcopy(quantized).double(), inputs.double())
    flips = [int((own != other).sum()) for own, other in zip(codes, exact_codes, strict=True)]
    assert flips[0] == 0
    assert 0 < sum(flips[:3]) < 1e-4 * codes[1].numel() < flips[-2]
    own = (logits - exact).abs().max()
    path, *_ = brevitas.export(quantized, plan, tmp_path / "net.onnx", inputs[:1])
    there = onnx_run(path, inputs)
    assert (there - logits).abs().max() <= 3 * own
    for other in (there, exact):
        assert (other.argmax(1) != logits.argmax(1)).sum() <= 2


@pytest.mark.example
def test_the_example_prints_accuracies_and_seconds(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    with_few_images: Callable[[ModuleType], None],
) -> None:
    from examples import brevitas_resnet

    few = ["--images", "64", "--steps", "2", "--epochs", "1", "--export", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["brevitas_resnet", *few])
    with_few_images(brevitas_resnet)
    brevitas_resnet.main()
    out = capsys.readouterr().out
    for row in ("plain", "bias correction", "GPTQ", "learned rounding", "QAT after learned rounding"):
        assert out.count(f"│ {row} ") == 3
    assert {path.name for path in tmp_path.iterdir()} == {
        "resnet20-uniform.onnx", "resnet20-mixquant.onnx", "resnet20-ptilmpq.onnx", "resnet20-ptilmpq.plan.json",
    }  # fmt: skip
