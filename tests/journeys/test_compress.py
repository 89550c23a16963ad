"""Deep Compression of a pretrained network and a sentence-transformer, as a user goes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from examples.cifar_resnet import checkpoint, evaluate, images, resnet
from mpq_plugins import Container, Plan, apply, decompress, verify
from mpq_plugins.compression.stages import layer_stages, planned, total
from tests.conftest import Ran

Mpq = Callable[..., Ran]


@pytest.mark.usefixtures("zoo")
def test_a_budgeted_resnet_in_a_file_of_its_planned_size(mpq: Mpq, tmp_path: Path) -> None:
    plan_file, packed, small = tmp_path / "plan.json", tmp_path / "packed.mpq", tmp_path / "small.mpq"
    assert mpq("plan", checkpoint(20), "-a", "budget", "--average-bits", 2.5, "-o", plan_file).code == 0
    assert mpq("compress", checkpoint(20), plan_file, "-o", packed, "--coding", "packed").code == 0
    assert mpq("compress", checkpoint(20), plan_file, "-o", small).code == 0
    plan = Plan.load(plan_file)
    promised = plan.size().total_bytes
    norms = sum(t.nbytes for name, t in decompress(packed).items() if name.removesuffix(".weight") not in plan.by_name)
    assert abs(packed.stat().st_size - norms - promised) <= 0.01 * promised + 4096
    assert small.stat().st_size < 0.93 * packed.stat().st_size
    assert mpq("decompress", small, "-o", tmp_path / "net.safetensors").code == 0
    net, original = resnet(20), resnet(20)
    net.load_state_dict(load_file(tmp_path / "net.safetensors"), strict=False)  # it counts no batches
    verify(net, plan, original=original)
    assert evaluate(net, *images()) == evaluate(apply(original, plan), *images())


@pytest.mark.usefixtures("zoo")
def test_huffman_saves_what_the_paper_says_on_a_pruned_and_shared_resnet(mpq: Mpq, tmp_path: Path) -> None:
    plan_file, small = tmp_path / "plan.json", tmp_path / "small.mpq"
    words = ["-a", "uniform", "--bits", 5, "--scheme", "codebook", "--init", "linear"]
    assert mpq("plan", checkpoint(20), *words, "-o", plan_file).code == 0
    assert mpq("compress", checkpoint(20), plan_file, "-o", small, "--prune", 0.6).code == 0
    container = Container.open(small)
    whole = total(layer_stages(container, name) for name in planned(container))
    assert whole.sparsity == pytest.approx(0.6, abs=0.01)
    assert 1 - whole.huffman / whole.packed >= 0.15
    assert whole.stored <= whole.huffman


def test_a_sentence_transformer_without_its_class(mpq: Mpq, minilm: Path, tmp_path: Path) -> None:
    plan_file, small = tmp_path / "plan.json", tmp_path / "small.mpq"
    words = ["-a", "uniform", "--bits", 4, "--granularity", "per_channel"]
    assert mpq("plan", minilm, *words, "-o", plan_file).code == 0
    assert mpq("compress", minilm, plan_file, "-o", small).code == 0
    assert small.stat().st_size < Plan.load(plan_file).size().total_bytes
    found, source = decompress(small), load_file(minilm)
    assert found.keys() == source.keys()
    assert mpq("apply", minilm, plan_file, "-o", tmp_path / "applied.safetensors").code == 0
    applied = load_file(tmp_path / "applied.safetensors")
    assert all(found[name].equal(tensor) for name, tensor in applied.items())
