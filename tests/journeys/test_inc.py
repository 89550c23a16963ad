"""Pretrained networks through Neural Compressor, as a user goes: quantize, tune by accuracy, save, load, pack."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from examples.cifar_resnet import evaluate, images, resnet
from mpq_plugins import PTILMPQ, Affine, MixQuant, Uniform, measure
from mpq_plugins import apply as simulated
from tests.adapters.compressor import same

pytestmark = [pytest.mark.usefixtures("zoo")]
inc = pytest.importorskip("mpq_plugins.adapters.inc")
incs = pytest.importorskip("neural_compressor.torch.quantization")
algorithms = pytest.importorskip("neural_compressor.torch.utils.utility").algos_mapping

TRIED = [4, 3, 2, 1.5]


def calls_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The QEM of each call of the registered algorithm."""
    calls: list[float] = []
    own: Any = algorithms[name]

    def wrapped(*arguments: Any, **options: Any) -> nn.Module:
        model: nn.Module = own(*arguments, **options)
        calls.append(inc.plan_of(model).allocator.parameters["qem"])
        return model

    monkeypatch.setitem(algorithms, name, wrapped)
    return calls


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_weights_are_our_fake_quantization_to_the_bit(granularity: Any) -> None:
    net = resnet(20)
    table = measure(net, Affine(granularity=granularity), range(1, 9), fold_bn=False)
    allocators: list[Any] = [*(Uniform(bits=b) for b in (1, 2, 8)), MixQuant(qem=2.0), PTILMPQ()]
    for allocator in allocators:
        plan = allocator(table)
        quantized = inc.apply(net, plan)
        assert same(quantized, simulated(net, plan))
        assert len(inc.verify(quantized, plan, net)) == 20


@pytest.mark.parametrize("tuner", ["ours", "theirs"])
def test_tuning_resnet20_to_one_percent(tuner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = resnet(20)
    before = copy.deepcopy(net)
    pictures, labels = images("calib_1024.npz")
    calls = calls_of("mixquant", monkeypatch)
    config = incs.TuningConfig(config_set=inc.MixQuantConfig(qem=TRIED), tolerable_loss=0.01)
    run = inc.autotune if tuner == "ours" else incs.autotune
    tuned = run(net, config, eval_fn=lambda model: evaluate(model, pictures[:256], labels[:256])[0])
    plan = inc.plan_of(tuned)
    assert calls == [4.0, 3.0]  # the custom algorithm, and no other, from the smallest plan up
    assert plan.allocator.parameters["qem"] == 3.0
    uniform = Uniform(bits=8)(measure(net, bits=(8,), fold_bn=False))
    assert plan.size().total_bits < 0.75 * uniform.size().total_bits
    assert same(net, before)
    assert evaluate(tuned, *images())[0] > 90.5  # of 91.73 in float, on images that no part of this has seen
    inc.save(tuned, tmp_path / "saved")
    assert same(inc.load(tmp_path / "saved", net), tuned)


def test_tuning_minilm_to_one_percent(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from examples.minilm_torchao import minilm as encoder
    from examples.minilm_torchao import spearman

    model, tokenizer = encoder()
    calls = calls_of("mixquant", monkeypatch)
    config = incs.TuningConfig(config_set=inc.MixQuantConfig(qem=TRIED), tolerable_loss=0.01)
    tuned = inc.autotune(model, config, eval_fn=lambda net: spearman(net, tokenizer, 50))
    plan = inc.plan_of(tuned)
    uniform = Uniform(bits=8)(measure(model, bits=(8,)))
    assert calls
    assert calls[0] == 4.0
    assert plan.size().total_bits < 0.9 * uniform.size().total_bits
    assert len(inc.verify(tuned, plan, model)) == 40


def test_minilm_packed_by_the_compressors_own_rtn(minilm: Path) -> None:
    pytest.importorskip("transformers")
    from examples.minilm_torchao import minilm as encoder

    model, tokenizer = encoder()
    scheme = Affine(granularity="per_channel")
    plan = MixQuant(qem=3.0)(measure(model, scheme, skip=["embeddings.*", "pooler.*"]))
    quantized = incs.quantize(copy.deepcopy(model), inc.to_inc(plan, model=model))
    assert sum(check.stored == "packed" for check in inc.verify(quantized, plan, model)) == 36
    tokens = tokenizer(["A plane is taking off."], return_tensors="pt")
    with torch.no_grad():
        packed, ours = (net(**tokens).last_hidden_state for net in (quantized, simulated(model, plan)))
    assert torch.allclose(packed, ours, atol=0.02)
