"""FX from end to end: what is calibrated on, and what is refused before anything is made."""

from typing import Any

import pytest
import torch

from mpq_plugins import Affine, SettingError, Uniform, measure
from mpq_plugins.adapters import fx
from tests.adapters import nets
from tests.adapters.fx.test_preparation import pytestmark as warnings_of_torch

pytestmark = warnings_of_torch
IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_every_batch_counts_and_smaller_ones_are_welcome() -> None:
    model = nets.made(nets.SmallNet)
    plan = Uniform(bits=8)(measure(model, Affine(granularity="per_channel"), (8,))).with_activation_bits(8)
    first, both = (fx.apply(model, plan, batches) for batches in ([IMAGES[:8]], [IMAGES[:8], 4 * IMAGES[8:11]]))
    assert first.conv1_input_scale_0 < both.conv1_input_scale_0  # type: ignore[operator]
    fx.verify(both, plan, model, batch=IMAGES[:3])
    one, tupled = (fx.apply(model, plan, batches)(IMAGES) for batches in ([IMAGES], [(IMAGES,)]))
    assert one.equal(tupled)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ((), "batches: none given, and FX sets the ranges of activations by them"),
        (IMAGES, "batches: a single tensor is one batch"),
        ([{"x": IMAGES}], "batches: holds a dict; FX takes a tensor, or a tuple of arguments"),
        ([IMAGES, IMAGES[:, :2]], "^batches: .* does not run on a batch"),
        ([IMAGES[:, :2]], "^batches: .* does not run on a batch"),
    ],
)
def test_batches_that_fx_cannot_take(batches: Any, said: str) -> None:
    model = nets.made(nets.SmallNet)
    plan = Uniform(bits=8)(measure(model, Affine(granularity="per_channel"), (8,))).with_activation_bits(8)
    with pytest.raises(SettingError, match=said):
        fx.apply(model, plan, batches)
