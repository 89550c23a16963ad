"""The benchmark's shapes have the published numbers of weights."""

import math

import pytest

from tests.benchmarks.shapes import ARCHITECTURES

# Parameters of the torchvision models less biases and BatchNorm, in millions.
PUBLISHED = {"ResNet-18": 11.68, "ResNet-34": 21.78, "ResNet-50": 25.50, "ResNet-101": 44.44, "ResNet-152": 60.04,
             "ResNeXt-50 32x4d": 24.96, "ResNeXt-101 32x8d": 88.59}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_as_published(name: str) -> None:
    weights = sum(math.prod(shape) for shape in ARCHITECTURES[name]())
    assert weights / 1e6 == pytest.approx(PUBLISHED[name], abs=0.01)
