"""PT2E from end to end: what is exported and calibrated on, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Affine, SettingError, SourceError, Uniform, measure
from tests.adapters import nets
from tests.adapters.pt2e.test_quantizer import pytestmark as warnings_of_torch

pt2e = pytest.importorskip("mpq_plugins.adapters.pt2e")

pytestmark = warnings_of_torch
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SYMMETRIC = Affine(granularity="per_channel", symmetric=True)


class Named(nets.SmallNet):
    """Takes its input by a name of its own."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


def plan_for(model: nn.Module, activation_bits: int | None) -> Any:
    return Uniform(bits=4)(measure(model, SYMMETRIC, (4,))).with_activation_bits(activation_bits)


@pytest.mark.parametrize(
    "batch", [IMAGES, (IMAGES,), [IMAGES], {"images": IMAGES}], ids=lambda batch: type(batch).__name__
)
def test_a_batch_is_a_tensor_arguments_or_keywords(batch: Any) -> None:
    model = nets.made(Named)
    plan = plan_for(model, 8)
    assert len(pt2e.verify(pt2e.apply(model, plan, [batch]), plan, model, batch=batch)) == 3


def test_every_batch_counts() -> None:
    model = nets.made(nets.SmallNet)
    plan = plan_for(model, 8)
    first, both = (pt2e.apply(model, plan, batches)(IMAGES) for batches in ([IMAGES], [IMAGES, 4 * IMAGES]))
    assert not first.equal(both)


def test_what_cannot_be_exported_and_batches_that_cannot_be_taken() -> None:
    model = nets.made(nets.Branching)
    plan = Uniform(bits=4)(measure(model, SYMMETRIC, (4,), fold_bn=False))
    with pytest.raises(SourceError, match="cannot export it"):
        pt2e.apply(model, plan, [IMAGES])
    model = nets.made(nets.SmallNet)
    for batches, said in (
        ((), "batches: none given, and PT2E exports the model by one"),
        ([IMAGES[:, :2]], "SmallNet does not run on a batch"),
        ([IMAGES, IMAGES[:2]], "does not run on a batch of .2, 3, 8, 8"),
    ):
        with pytest.raises(SettingError, match=said):
            pt2e.apply(model, plan_for(model, 8), batches)
