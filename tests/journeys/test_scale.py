"""A language model's checkpoint from `mpq measure`, killed on the way, to a plan and new weights."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mpq_plugins import LayerTable, Plan
from mpq_plugins.checkpoints.shards import INDEX_NAME
from mpq_plugins.quantization.quantize import fake_quantize
from tests.benchmarks import llm
from tests.conftest import Ran
from tests.helpers.stores import has_units

OPTIONS = ("--granularity", "per_channel", "--range", "mse", "--bits", "2-8", "--per-channel-errors")
SKIP = ("--skip", "role:embeddings", "--skip", "role:lm_head", "--skip", "role:routers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llm.write("small-experts", tmp_path_factory.mktemp("scale") / "model", shard=4 << 20)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mpq_plugins", "measure", *map(str, arguments)]


def killed_in_the_middle(arguments: list[str], partial: Path) -> None:
    """Start it, and send SIGKILL once a unit is recorded."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not has_units(partial):
            time.sleep(0.001)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL


def test_a_measurement_killed_goes_on_to_the_same_bytes(
    checkpoint: Path, tmp_path: Path, mpq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, table = tmp_path / "whole.mpqt", tmp_path / "killed.mpqt"
    assert mpq("measure", checkpoint, *OPTIONS, "-o", whole).code == 0
    partial = tmp_path / "killed.mpqt.partial"
    killed_in_the_middle(command(checkpoint, *OPTIONS, "-o", table, "--workers", 1), partial)
    assert partial.exists()
    assert not table.exists()
    found = subprocess.run(command(checkpoint, *OPTIONS, "-o", table), capture_output=True, text=True, check=True)
    assert found.stderr == f"mpq: an earlier run left {partial}: what it finished of this measurement is used\n"
    assert table.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.mpqt", "whole.mpqt"]


def test_from_shards_of_experts_to_new_shards(checkpoint: Path, tmp_path: Path, mpq: Callable[..., Ran]) -> None:
    table, plan_file, out = tmp_path / "model.mpqt", tmp_path / "plan.json", tmp_path / "out"
    assert mpq("measure", checkpoint, *OPTIONS, *SKIP, "--workers", 2, "-o", table).code == 0
    measured = LayerTable.load(table)
    assert len(measured.layers) == 2 * (4 + 2 * 8)
    assert set(measured.skipped) == {"model.embed_tokens", "lm_head", *(f"model.layers.{n}.mlp.gate" for n in (0, 1))}
    ran = mpq(
        "plan",
        table,
        "--allocator",
        "budget",
        "--bits",
        "2-8",
        "--average-bits",
        4,
        "--tie",
        "qkv",
        "--no-parts",
        "-o",
        plan_file,
    )
    assert ran.code == 0, ran.err
    plan = Plan.load(plan_file)
    for block in range(2):
        assert len({plan.by_name[f"model.layers.{block}.self_attn.{word}_proj"].bits for word in "qkv"}) == 1
    assert mpq("apply", checkpoint, plan_file, "-o", out).code == 0
    weight_map = json.loads((out / INDEX_NAME).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 1
    for name, shard in weight_map.items():
        before, after = load_file(checkpoint / shard)[name], load_file(out / shard)[name]
        if "experts" in name:
            for expert, matrix in enumerate(before):
                layer = plan.by_name[f"{name}.{expert}"]
                assert layer.bits is not None
                assert after[expert].equal(fake_quantize(matrix, layer.bits, layer.scheme))
        elif (own := plan.by_name.get(name.removesuffix(".weight"))) is not None:
            assert own.bits is not None
            assert after.equal(fake_quantize(before, own.bits, own.scheme))
        else:
            assert after.equal(before)
