"""MiniLM through torchao, as a user goes: plan, apply, verify, and the similarity of sentences kept."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mpq_plugins import MixQuant, Uniform, measure
from tests.conftest import Ran

pytestmark = [
    pytest.mark.usefixtures("zoo", "minilm"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PAIRS = 300


def test_uniform_4_bits_keeps_similarities() -> None:
    pytest.importorskip("transformers")
    torchao = pytest.importorskip("mpq_plugins.adapters.torchao")
    from examples.minilm_torchao import SCHEME, minilm, spearman

    model, tokenizer = minilm()
    plan = Uniform(bits=4)(measure(model, SCHEME, (4,)))
    quantized = torchao.apply(model, plan)
    assert len(torchao.verify(quantized, plan, model)) == 40
    exact, reached = (spearman(net, tokenizer, PAIRS) for net in (model, quantized))
    assert exact > 0.85
    assert abs(reached - exact) <= 0.01


def test_the_stock_config_is_what_transformers_takes() -> None:
    transformers = pytest.importorskip("transformers")
    torchao = pytest.importorskip("mpq_plugins.adapters.torchao")
    from examples.minilm_torchao import SCHEME, folder, minilm

    model, _ = minilm()
    plan = MixQuant(qem=3.0)(measure(model, SCHEME, only=["encoder.*"]))
    config = transformers.TorchAoConfig(quant_type=torchao.to_config(plan, model))
    loaded = transformers.AutoModel.from_pretrained(folder(), quantization_config=config)
    for name, layer in plan.by_name.items():
        assert loaded.get_submodule(name).weight.target_dtype == getattr(torch, f"int{layer.bits}")
    assert type(loaded.pooler.dense.weight) is torch.nn.Parameter


def test_mpq_check_names_the_backend(mpq: Callable[..., Ran], minilm: Path, tmp_path: Path) -> None:
    pytest.importorskip("mpq_plugins.adapters.torchao")
    threads = torch.get_num_threads()
    Uniform(bits=4)(measure(minilm, bits=(4,))).save(tmp_path / "plan.json")
    ran = mpq("check", tmp_path / "plan.json", minilm, "--backend", "torchao")
    assert ran.code == 0
    assert "torchao runs it as it is" in ran.out
    assert torch.get_num_threads() == threads
