"""What holds of every exporter: its contract, memory that does not follow the model, codes of any range and sign."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpq_plugins import (
    Affine,
    EntropyCoded,
    Exporter,
    LayerChoice,
    MismatchError,
    SourceError,
    Uniform,
    legalise,
    measure,
)
from mpq_plugins.adapters import gptq, mlx
from mpq_plugins.adapters.gptq import tensors as gptq_tensors
from mpq_plugins.adapters.mlx import tensors as mlx_tensors
from mpq_plugins.adapters.shared.exporting import Found
from mpq_plugins.checkpoints.checkpoint import open_checkpoint
from mpq_plugins.checkpoints.readers import MemoryRows, StoredTensor
from mpq_plugins.common import registry
from mpq_plugins.common.extras import missing_for
from mpq_plugins.simulation.integers import IntegerWeight
from tests.helpers.plans import linear

pytestmark = pytest.mark.filterwarnings("ignore")  # what backends warn of is theirs

OURS = sorted(
    plugin.name for plugin in registry.installed()
    if plugin.group == "exporters" and plugin.distribution == registry.OURS
)  # fmt: skip
CHANNELS = Affine(symmetric=True, granularity="per_channel")


@pytest.fixture(params=OURS)
def exporter(request: pytest.FixtureRequest) -> Exporter:
    if missing_for(request.param):
        pytest.skip(missing_for(request.param))
    loaded: Exporter = registry.load("exporters", request.param)
    return loaded


def saved(path: Path, **tensors: Tensor) -> Path:
    path.mkdir()
    save_file({f"{name}.weight": value for name, value in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


def test_there_are_exporters() -> None:
    assert {"compressed_tensors", "gptq", "mlx"} <= {*OURS}


@dataclass(frozen=True)
class Format:
    """How a format keeps a layer, as functions of the codes alone."""

    encode: Callable[[str, LayerChoice, StoredTensor], dict[str, Tensor]]
    decode: Callable[[str, LayerChoice, Found], Any]
    tensors: Any
    widths: tuple[int, ...]
    scale: torch.dtype = torch.float32


def formats() -> dict[str, Format]:
    def encode_gptq(parameter: str, choice: LayerChoice, stored: StoredTensor) -> dict[str, Tensor]:
        return gptq_tensors.encode(parameter, choice, stored, 1).tensors

    def decode_gptq(parameter: str, choice: LayerChoice, found: Found) -> Any:
        return gptq_tensors.decode(parameter, choice, found, 1)

    made = {
        "gptq": Format(encode_gptq, decode_gptq, gptq_tensors, gptq.CAPABILITIES.bits, torch.float16),
        "mlx": Format(mlx_tensors.encode, mlx_tensors.decode, mlx_tensors, mlx.CAPABILITIES.bits),
    }
    if not missing_for("compressed_tensors"):
        from mpq_plugins.adapters.compressed_tensors import tensors

        made["compressed_tensors"] = Format(tensors.encode, tensors.decode, tensors, tuple(range(2, 9)))
    return made


@pytest.mark.parametrize("name", sorted(formats()))
def test_all_codes_and_scales_of_either_sign_come_back(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = formats()[name]
    for bits in own.widths:
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (32, 64), generator=generator).to(torch.int8)
        codes[0, 0], codes[0, 1] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale = torch.randn(32, 2, generator=generator).to(torch.bfloat16).float()
        whole = IntegerWeight(codes, scale, torch.zeros(32, 2, dtype=torch.int64), 0, False)
        monkeypatch.setattr(own.tensors, "code_chunks", lambda *_, whole=whole: iter([whole]))
        choice = linear("fc", 32, 64, Affine(symmetric=True, granularity="per_group", group_size=32), bits)
        stored = StoredTensor((32, 64), torch.bfloat16, MemoryRows(torch.zeros(32, 64)), "fc.weight")
        file = tmp_path / f"{bits}.safetensors"
        save_file(own.encode("fc.weight", choice, stored), file)
        back = own.decode("fc.weight", choice, Found(open_checkpoint(file)))
        assert torch.equal(back.codes, codes)
        assert torch.equal(back.scales.scale.float(), scale.to(own.scale).float())
        assert not back.scales.zero_point.any()
        if name != "gptq":  # which has float16 alone
            kept = {str(t.dtype) for name, t in load_file(file).items() if "scale" in name or "bias" in name}
            assert kept == {"torch.bfloat16"}  # the model's own, where that is exact


def test_a_layer_with_a_bias_and_tensors_of_other_dtypes_are_kept(exporter: Exporter, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", fc=torch.randn(32, 64))
    others = {"fc.bias": torch.randn(32), "steps": torch.tensor(7), "mask": torch.tensor([True]),
              "nan": torch.tensor([torch.nan], dtype=torch.bfloat16), "empty": torch.zeros(0, 3)}  # fmt: skip
    save_file({**load_file(source / "model.safetensors"), **others}, source / "model.safetensors")
    plan = Uniform(bits=4)(measure(source, CHANNELS, (4,)))
    if exporter.CAPABILITIES.backend == "gguf":
        pytest.skip("it needs a language model")
    written = exporter.export(source, plan, tmp_path / "out")
    exporter.verify(written.path, plan, source)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in others.items():
        assert tensors[name].dtype == value.dtype
        assert tensors[name].flatten().view(torch.uint8).equal(value.flatten().view(torch.uint8))
    assert written.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    kept = sum(value.nbytes for value in others.values())
    assert written.layer_bytes == written.total_bytes - kept


def test_steps_of_entropy_coded_plans_are_scales(exporter: Exporter, tmp_path: Path) -> None:
    if exporter.CAPABILITIES.backend == "gguf":
        pytest.skip("it needs a language model")
    source = saved(tmp_path / "source", fc=torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
    plan = Uniform(bits=8)(measure(source, EntropyCoded(step=0.0625), (8,)))
    exporter.export(source, plan, tmp_path / "out")
    assert [check.layer for check in exporter.verify(tmp_path / "out", plan, source)] == ["fc"]


def test_torch_checkpoints_are_read_and_tied_weights_written_once(exporter: Exporter, tmp_path: Path) -> None:
    if exporter.CAPABILITIES.backend == "gguf":
        pytest.skip("it needs a language model")
    weight, source = torch.randn(64, 32), tmp_path / "source"
    source.mkdir()
    state = {"model.embed_tokens.weight": weight, "lm_head.weight": weight, "fc.weight": torch.randn(32, 64)}
    torch.save(state, source / "pytorch_model.bin")
    (source / "config.json").write_text('{"tie_word_embeddings": true}')
    plan = Uniform(bits=4)(measure(source, CHANNELS, (4,)))
    legal, _ = legalise(plan, exporter.CAPABILITIES)
    exporter.export(source, legal, tmp_path / "out")
    exporter.verify(tmp_path / "out", legal, source)
    names = {*load_file(tmp_path / "out" / "model.safetensors")}
    assert not any(name.startswith("lm_head") for name in names)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != "quantize_config.json") == [
        "config.json", "model.safetensors",
    ]  # fmt: skip


def test_progress_ends_at_all_weights(exporter: Exporter, tmp_path: Path) -> None:
    if exporter.CAPABILITIES.backend == "gguf":
        pytest.skip("it needs a language model")
    source = saved(tmp_path / "source", a=torch.randn(32, 64), b=torch.randn(64, 32))
    plan = Uniform(bits=4)(measure(source, CHANNELS, (4,)))
    said: list[tuple[str, int, int]] = []
    exporter.export(source, plan, tmp_path / "out", progress=lambda *one: said.append(one))
    assert said == [("a", 0, 4096), ("b", 2048, 4096), ("", 4096, 4096)]
    said.clear()
    exporter.verify(tmp_path / "out", plan, source, progress=lambda *one: said.append(one))
    assert said == [("a", 0, 4096), ("b", 2048, 4096), ("", 4096, 4096)]


def test_another_models_plan_is_refused(exporter: Exporter, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", fc=torch.randn(32, 64))
    other = saved(tmp_path / "other", another=torch.randn(32, 64))
    plan, _ = legalise(Uniform(bits=4)(measure(source, CHANNELS, (4,))), exporter.CAPABILITIES)
    with pytest.raises((MismatchError, SourceError)):
        exporter.check(plan, other)
    with pytest.raises((MismatchError, SourceError)):
        exporter.export(other, plan, tmp_path / "out.gguf")
    with pytest.raises((MismatchError, SourceError)):
        exporter.verify(tmp_path / "out.gguf", plan, other)
    assert not (tmp_path / "out.gguf").exists()


PEAK = """
import resource, sys
from pathlib import Path
from mpq_plugins import Plan
from mpq_plugins.adapters import mlx
from mpq_plugins.adapters.shared import layer_codes, shard_writer

layer_codes.CHUNK, shard_writer.BUFFERED = 1 << 18, 16 << 20
source, plan, output = map(Path, sys.argv[1:])
plan = Plan.load(plan)
mlx.export(source / "small", Plan.load(source / "small.json"), source / "warm")  # what is imported at work
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mlx.export(source / "large", plan, output)
mlx.verify(output, plan, source / "large")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


@pytest.mark.slow
def test_memory_follows_a_layer_and_a_shard_and_not_the_model(tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    weight = torch.randn(1024, 2048).to(torch.bfloat16)
    for name, count in (("small", 1), ("large", 60)):
        source = saved(root / name, **{f"fc{number}": weight.clone() for number in range(count)})
        Uniform(bits=8)(measure(source, CHANNELS, (8,))).save(root / f"{name}.json")
    assert (root / "large" / "model.safetensors").stat().st_size > 240 << 20
    run = [sys.executable, "-W", "ignore", "-c", PEAK, str(root), str(root / "large.json"), str(tmp_path / "out")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) >= 7
    assert int(done.stdout) < 64 << 20  # a quarter of the model
