"""transformers' Conv1D, whose weight is (inputs, outputs), is a layer of modules as of checkpoints."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mpq_plugins import (
    Affine,
    LayerTable,
    Plan,
    Uniform,
    apply,
    compensate,
    find_weights,
    measure,
    reconstruct,
    sensitivity,
    verify,
)
from mpq_plugins.measurement.moments import second_moments
from mpq_plugins.models.kinds import layer_kind, output_axis, quantizable_weights
from mpq_plugins.quantization.quantize import fake_quantize
from mpq_plugins.simulation.checkpoint import rewrite
from mpq_plugins.simulation.integers import integer_weight
from mpq_plugins.simulation.match import match

pytest.importorskip("transformers")

SCHEME = Affine(granularity="per_channel", symmetric=True)
CONV1D = [f"transformer.h.{block}.{name}" for block in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc",
                                                                           "mlp.c_proj")]  # fmt: skip
MODULE = "import sys, torch; from mpq_plugins.models.kinds import layer_kind; layer_kind(torch.nn.ReLU())"


@pytest.fixture(scope="module")
def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
    return cast(Any, GPT2LMHeadModel(config)).eval()


@pytest.fixture(scope="module")
def saved(gpt2: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("gpt2")
    gpt2.save_pretrained(folder)
    return folder


def batches() -> list[Tensor]:
    return [torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]


def table(source: Any) -> LayerTable:
    return measure(source, SCHEME, (2, 4, 8), per_channel=True)


def plan(source: Any) -> Plan:
    return Uniform(bits=4)(table(source))


def test_transformers_is_not_imported_for_it() -> None:
    said = subprocess.run([sys.executable, "-c", f"{MODULE}; print('transformers' in sys.modules)"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert said.stdout.strip() == "False"


def test_its_kind_and_axis(gpt2: Any) -> None:
    layer = gpt2.get_submodule(CONV1D[0])
    assert (layer_kind(layer), output_axis(layer)) == ("linear", 1)
    assert (layer_kind(nn.Conv1d(2, 2, 1)), output_axis(nn.Conv1d(2, 2, 1))) == ("conv1d", 0)


def test_a_module_and_its_checkpoint_are_planned_alike(gpt2: Any, saved: Path) -> None:
    of_module, of_file = (
        {weight.name: (weight.kind, weight.shape, weight.channel_axis) for weight in find_weights(source)}
        for source in (gpt2, saved)
    )
    assert of_module == of_file
    assert [name for name, (_, _, axis) in of_module.items() if axis == 1] == CONV1D
    assert table(gpt2).fingerprint == table(saved).fingerprint
    for made, other in ((plan(gpt2), saved), (plan(saved), gpt2)):
        found = match(made, other, weights=True)
        assert not found.problems
        assert not found.notes


def test_it_is_quantized_by_output(gpt2: Any, saved: Path, tmp_path: Path) -> None:
    made = plan(gpt2)
    applied = apply(gpt2, made)
    assert len(verify(applied, made, gpt2)) == len(made.layers)
    rewrite(saved, made, tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    for name in CONV1D:
        weight, quantized = (quantizable_weights(model)[name].detach() for model in (gpt2, applied))
        # As a linear layer has it, outputs first, which is quantized by rows.
        assert torch.equal(quantized, fake_quantize(weight.T.contiguous(), 4, SCHEME, layer=name).T)
        assert torch.equal(written[f"{name}.weight"], quantized)
        integers = integer_weight(weight, made.by_name[name])
        assert integers.scale.numel() == weight.shape[1]
        assert torch.equal(integers.dequantized(), quantized)


def test_second_moments_are_its_inputs(gpt2: Any) -> None:
    layer = gpt2.get_submodule(CONV1D[2])
    seen: list[Tensor] = []
    with_hook = layer.register_forward_hook(lambda _, args, __: seen.append(args[0].detach().double()))
    found = second_moments(gpt2, {"fc": [layer]}, batches())["fc"]
    with_hook.remove()
    inputs = torch.cat(seen)
    expected = inputs.square().sum((0, 1)) / len(inputs)
    torch.testing.assert_close(found, expected.float()[:, None].expand_as(layer.weight))


@pytest.mark.parametrize("kind", ["output_mse", "hessian", "kl", "distance", "fisher", "compensated_mse"])
def test_sensitivities_reach_it(gpt2: Any, kind: str) -> None:
    measured = sensitivity(gpt2, table(gpt2), kind, batches())
    curves = [layer.sensitivities[kind] for layer in measured.layers if layer.name in CONV1D]
    assert len(curves) == len(CONV1D)
    assert all(curve[0] >= curve[-1] for curve in curves)
    assert sum(curve[0] for curve in curves) > 0


def test_other_ways_to_round_keep_its_grid(gpt2: Any) -> None:
    made = plan(gpt2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that are rounded to nearest
        for rounded in (compensate(gpt2, made, batches()), reconstruct(gpt2, made, batches(), steps=2)):
            applied = apply(rounded, made)
            assert verify(applied, made)
            assert not all(torch.equal(value, gpt2.state_dict()[key]) for key, value in applied.state_dict().items())
