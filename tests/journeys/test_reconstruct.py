"""From a pretrained network and a plan to learned codes, as a user goes: in Python, and by `mpq reconstruct`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mpq_plugins as mpq
from examples.brecq_table import ends_at_8
from examples.cifar_resnet import evaluate, images, resnet
from tests.conftest import Ran

pytestmark = pytest.mark.usefixtures("zoo")

SCHEME = mpq.Affine(granularity="per_channel", range="mse")


def few() -> list[Tensor]:
    """256 training images, for `--calibrate tests.journeys.test_reconstruct:few`."""
    return list(images("calib_1024.npz")[0][:256].split(128))


def score(net: torch.nn.Module) -> dict[str, float]:
    """For `--eval`."""
    top1, loss = evaluate(net, *images())
    return {"top-1 %": top1, "cross-entropy": loss}


def test_two_bits_are_learned_where_rounding_to_nearest_fails() -> None:
    net, (inputs, labels) = resnet(20), images()
    plan = ends_at_8(mpq.Uniform(bits=2)(mpq.measure(net, SCHEME, (2, 8))))
    reports: list[mpq.BlockReport] = []
    learned = mpq.reconstruct(net, plan, few(), steps=60, lr=0.02, finished=reports.append)
    assert [report.name for report in reports] == [
        "conv1", *(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)), "linear",
    ]  # fmt: skip
    assert all(report.learned <= report.nearest for report in reports)
    mpq.verify(learned, plan, learned)
    nearest, _ = evaluate(mpq.apply(net, plan), inputs, labels)
    top1, loss = evaluate(learned, inputs, labels)
    assert nearest < 40  # the published figure without reconstruction is 23.9
    assert top1 > 84
    assert loss < 0.6


@pytest.mark.example
def test_corrected_parts_below_two_bits_are_learned() -> None:
    net = resnet(20)
    plan = mpq.Budget(average_bits=1.75, bits=(1, 2, 3, 4))(mpq.measure(net, SCHEME, range(1, 5), per_channel=True))
    learned = mpq.reconstruct(net, plan, few(), steps=60, lr=0.02, correct=True)
    mpq.verify(learned, plan, learned)
    top1, loss = evaluate(learned, *images())
    assert top1 > 86
    assert loss < 0.65


def test_the_command_writes_what_every_step_after_it_takes(mpq: Callable[..., Ran], tmp_path: Path) -> None:
    plan, out, again = (tmp_path / name for name in ("plan.json", "learned.safetensors", "again.safetensors"))
    factory = "examples.cifar_resnet:resnet20"
    scheme = ("--granularity", "per_channel", "--range", "mse")
    assert mpq("plan", factory, "-a", "uniform", "--bits", 2, *scheme, "-o", plan).code == 0
    words = ("--calibrate", "tests.journeys.test_reconstruct:few", "--steps", 10, "--lr", 0.05)
    evaluated = ("--eval", "tests.journeys.test_reconstruct:score", "--json")
    ran = mpq("reconstruct", factory, plan, *words, *evaluated, "-o", out)
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert len(document["blocks"]) == 11
    scores = {name: values["cross-entropy"] for name, values in document["scores"].items()}
    assert scores["float"] < scores["learned"] < scores["nearest"]
    assert mpq("apply", out, plan, "-o", again).code == 0
    first, second = load_file(out), load_file(again)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    assert {path.name for path in tmp_path.iterdir()} == {plan.name, out.name, again.name}
