"""Plans on the pretrained ResNet-20 through FX, as a user goes: prepare, calibrate, convert, verify, evaluate."""

import copy
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx

from examples.cifar_resnet import evaluate, images, resnet
from mpq_plugins import PTILMPQ, Affine, LayerTable, MixQuant, Uniform, apply, measure
from mpq_plugins.adapters import fx

pytestmark = [
    pytest.mark.usefixtures("zoo"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.ao.quantization"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.ao.quantization"),
]


@cache
def table(granularity: Any) -> LayerTable:
    return measure(resnet(20), Affine(granularity=granularity))


@pytest.mark.parametrize(
    ("granularity", "allocator"),
    [("per_tensor", MixQuant(qem=2.0)), ("per_channel", Uniform(bits=4)), ("per_channel", PTILMPQ(alpha=0.5))],
    ids=lambda value: getattr(value, "name", value),
)
def test_accuracy_is_that_of_apply_within_what_activations_cost(granularity: str, allocator: Any) -> None:
    net, data = resnet(20), images()
    plan = allocator(table(granularity))
    weights_only, _ = evaluate(apply(net, plan), *data)
    prepared = fx.prepare(net, plan.with_activation_bits(8), data[0][:1])
    with torch.no_grad():
        for batch in images("calib_1024.npz")[0][:512].split(128):
            prepared(batch)
    for convert in (convert_to_reference_fx, convert_fx):
        converted = convert(copy.deepcopy(prepared))
        assert len(fx.verify(converted, plan.with_activation_bits(8), net, batch=data[0][:8])) == 20
        assert abs(evaluate(converted, *data)[0] - weights_only) <= 0.6


def test_the_example_prints_accuracy_size_and_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, with_few_images: Callable[[ModuleType], None]
) -> None:
    from examples import fx_resnet

    monkeypatch.setattr(sys, "argv", ["fx_resnet", "--depth", "20"])
    monkeypatch.setattr(fx_resnet, "BATCH", 8)  # it is timed on batches of so many
    with_few_images(fx_resnet)
    fx_resnet.main()
    out = capsys.readouterr().out
    assert "FX converted" in out
    assert "FX reference" in out
