"""A plan on the pretrained ResNet-20 through PT2E: logits to the bit, and accuracy with quantized activations."""

from typing import cast

import pytest
import torch
from torch.fx import GraphModule

from examples.cifar_resnet import evaluate, images, resnet
from mpq_plugins import PTILMPQ, Affine, Uniform, apply, measure
from mpq_plugins.models.folding import fold_batch_norm

pt2e = pytest.importorskip("mpq_plugins.adapters.pt2e")

pytestmark = [
    pytest.mark.usefixtures("zoo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:erase_node:UserWarning"),
]


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_resnet_20(activation_bits: int | None) -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    net, (inputs, labels) = resnet(20), images()
    allocator = PTILMPQ() if activation_bits is None else Uniform(bits=6)
    plan = allocator(measure(net, Affine(granularity="per_channel", symmetric=True))).with_activation_bits(
        activation_bits
    )
    batch = {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(net, (inputs[:2].clone(),), dynamic_shapes=(batch,)).module()
    prepared = prepare_pt2e(exported, pt2e.PlanQuantizer(plan, net))
    with torch.no_grad():
        for images_ in images("calib_1024.npz")[0][:512].split(128):
            prepared(images_)
    quantized = cast(GraphModule, convert_pt2e(prepared))
    checks = pt2e.verify(quantized, plan, net)
    assert len(checks) == 20
    assert {check.activation_bits for check in checks} == {activation_bits}
    ours = apply(fold_batch_norm(net), plan.with_activation_bits(None))
    if activation_bits is None:
        with torch.no_grad():
            assert quantized(inputs[:128]).equal(ours(inputs[:128]))
    assert abs(evaluate(quantized, inputs, labels)[0] - evaluate(ours, inputs, labels)[0]) <= 0.6
