"""16 bits and sizes of the whole model, as the commands print them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpq_plugins import Affine, Plan, Uniform, measure
from tests.conftest import Ran
from tests.helpers.nets import conv_net
from tests.helpers.plans import with_layer

SCHEME = Affine(granularity="per_channel")
Mpq = Callable[..., Ran]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save_file({name: value for name, value in conv_net().state_dict().items() if value.is_floating_point()}, path)
    return path


def planned(source: Path, path: Path, **bits: int) -> Plan:
    plan = Uniform(bits=4)(measure(source, SCHEME, (4,), skip=["conv1"]))
    for name, width in bits.items():
        plan = with_layer(plan, name, bits=width)
    plan.save(path)
    return plan


@pytest.mark.parametrize(
    ("bits", "said", "counts"),
    [
        ({}, "3 layers fake-quantized (nearest), everything else as it was", {"fake-quantized": 3}),
        (
            {"fc": 16},
            "2 layers fake-quantized (nearest), 1 in float16, everything",
            {"fake-quantized": 2, "float16": 1},
        ),
        ({"fc": 32}, "2 layers fake-quantized (nearest), everything", {"fake-quantized": 2, "as they were": 1}),
        ({"fc": 16, "up": 16, "conv2": 32}, "pt: 2 in float16, everything", {"float16": 2, "as they were": 1}),
    ],
)
def test_apply_counts_what_it_wrote_as_what(
    mpq: Mpq, tmp_path: Path, bits: dict[str, int], said: str, counts: dict[str, int]
) -> None:
    source, out = tmp_path / "net.pt", tmp_path / "q.pt"
    torch.save(conv_net().state_dict(), source)
    planned(source, tmp_path / "plan.json", **bits)
    assert said in mpq("apply", source, tmp_path / "plan.json", "-o", out).out
    document = json.loads(mpq("apply", source, tmp_path / "plan.json", "-o", out, "--force", "--json").out)
    assert document["as"] == counts


def test_what_is_bfloat16_stays_so_and_that_is_said(mpq: Mpq, tmp_path: Path, source: Path) -> None:
    half = {name: value.to(torch.bfloat16) for name, value in load_file(source).items()}
    save_file(half, source)
    planned(source, tmp_path / "plan.json", fc=16)
    out = tmp_path / "q.safetensors"
    assert (
        "2 layers fake-quantized (nearest), 1 in bfloat16, everything"
        in mpq("apply", source, tmp_path / "plan.json", "-o", out).out
    )
    assert load_file(out)["fc.weight"].equal(half["fc.weight"])


def test_show_and_plan_say_float16_and_the_size_of_the_whole_model(mpq: Mpq, tmp_path: Path, source: Path) -> None:
    plan = planned(source, tmp_path / "plan.json", fc=16, up=32)
    shown = mpq("show", tmp_path / "plan.json").out
    rows = {name: next(line for line in shown.splitlines() if f" {name} " in line) for name in ("fc", "up", "conv2")}
    assert "float16" in rows["fc"]
    assert "float32" in rows["up"]
    assert "float" not in rows["conv2"]
    size = plan.size()
    whole = next(line for line in shown.splitlines() if line.startswith("whole model"))
    beside = source.stat().st_size - 8 - int.from_bytes(source.read_bytes()[:8], "little")
    beside -= sum(4 * layer.numel for layer in plan.layers)
    assert size.model_bytes == size.total_bytes + beside
    assert (
        f"{size.model_bytes / 1000:.2f} kB: {size.total_bytes / 1000:.2f} kB in total and {beside / 1000:.2f} kB"
        in whole
    )
    assert "biases, norms, buffers, 1 skipped layer)" in " ".join(shown.split())
    found = json.loads(mpq("show", tmp_path / "plan.json", "--json").out)["size"]
    assert (found["rest_bytes"], found["model_bytes"]) == (beside, size.model_bytes)


def test_a_size_in_words_is_that_of_the_whole_model(mpq: Mpq, tmp_path: Path, source: Path) -> None:
    for asked, most in (("1.3kB", 1300), ("1.2 KiB", 1228)):
        ran = mpq("plan", source, "-a", "budget", "--size", asked, "--pin", "fc=16", "-o", tmp_path / "p.json")
        assert ran.code == 0, ran.err
        made = Plan.load(tmp_path / "p.json")
        assert made.size().model_bytes is not None
        assert 0.9 * most < made.size().model_bytes <= most  # type: ignore[operator]
        assert made.by_name["fc"].bits == 16
    refused = mpq("plan", source, "-a", "budget", "--size", "9 potatoes")
    assert refused.code == 2
    assert "9MB, 120kB, 1.5MiB" in refused.err
    small = mpq("plan", source, "-a", "budget", "--size", "100B")
    assert small.code == 2
    assert "size: 100 cannot be reached: the least is" in small.err


@pytest.mark.filterwarnings("ignore")  # what backends warn of is theirs
@pytest.mark.parametrize("backend", ["fx", "torchao", "pt2e", "brevitas", "inc"])
def test_check_says_what_a_backend_stores(mpq: Mpq, tmp_path: Path, source: Path, backend: str) -> None:
    plan = planned(source, tmp_path / "plan.json")
    ran = mpq("check", tmp_path / "plan.json", source, "--backend", backend)
    assert ran.code == 0, ran.err
    (line,) = [line for line in ran.out.splitlines() if line.startswith(f"{backend} stores ")]
    assert line.endswith("in total")
    document = json.loads(mpq("check", tmp_path / "plan.json", source, "--backend", backend, "--json").out)
    assert document["stored"]["as"] in line
    assert document["stored"]["bytes"] >= plan.size().numel


def test_an_adapter_that_does_not_say_is_not_guessed_for(mpq: Mpq, tmp_path: Path, source: Path) -> None:
    planned(source, tmp_path / "plan.json")
    document = json.loads(mpq("check", tmp_path / "plan.json", source, "--json").out)
    assert "stored" not in document
