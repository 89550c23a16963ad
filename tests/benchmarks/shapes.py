"""Weight shapes of ImageNet ResNets and ResNeXts (He et al. 2015; Xie et al. 2016), first layer to last."""

from collections.abc import Callable
from functools import partial

Shapes = list[tuple[int, ...]]


def basic(blocks: tuple[int, ...]) -> Shapes:
    """ResNet-18 and -34: two 3 x 3 convolutions a block."""
    shapes: Shapes = [(64, 3, 7, 7)]
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(count):
            shapes += [(width, inputs, 3, 3), (width, width, 3, 3)]
            if block == 0 and stage > 0:
                shapes.append((width, inputs, 1, 1))
            inputs = width
    return [*shapes, (1000, inputs)]


def bottleneck(blocks: tuple[int, ...], groups: int = 1, group_width: int = 64) -> Shapes:
    """ResNet-50 and up, ResNeXt: 1 x 1, grouped 3 x 3, 1 x 1."""
    shapes: Shapes = [(64, 3, 7, 7)]
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 2**stage * group_width * groups
        outputs = 256 * 2**stage
        for block in range(count):
            shapes += [(width, inputs, 1, 1), (width, width // groups, 3, 3), (outputs, width, 1, 1)]
            if block == 0:
                shapes.append((outputs, inputs, 1, 1))
            inputs = outputs
    return [*shapes, (1000, inputs)]


ARCHITECTURES: dict[str, Callable[[], Shapes]] = {
    "ResNet-18": partial(basic, (2, 2, 2, 2)),
    "ResNet-34": partial(basic, (3, 4, 6, 3)),
    "ResNet-50": partial(bottleneck, (3, 4, 6, 3)),
    "ResNet-101": partial(bottleneck, (3, 4, 23, 3)),
    "ResNet-152": partial(bottleneck, (3, 8, 36, 3)),
    "ResNeXt-50 32x4d": partial(bottleneck, (3, 4, 6, 3), 32, 4),
    "ResNeXt-101 32x8d": partial(bottleneck, (3, 4, 23, 3), 32, 8),
}
