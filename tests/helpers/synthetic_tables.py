"""Tables of networks of any size, made of plain numbers: nothing is measured, and nothing need be downloaded."""

from collections.abc import Sequence

import numpy as np

from mpq_plugins import Affine, LayerStats, LayerTable
from mpq_plugins.plans.scheme import Scheme

BITS = tuple(range(1, 9))
Shapes = Sequence[tuple[str, tuple[int, ...]]]


def synthetic_table(
    shapes: Shapes, *, seed: int = 0, scheme: Scheme | None = None, by_channel: bool = False, kind: str | None = None
) -> LayerTable:
    """Errors that fall by about half with every bit, other ones in every layer; importances are drawn."""
    random = np.random.default_rng(seed)
    layers = []
    for name, shape in shapes:
        falling = 0.5 ** (np.arange(8) * random.uniform(0.8, 1.1))
        relative = np.asarray(0.9 * falling * random.uniform(0.5, 1.5), np.float64)
        norms = random.gamma(4.0, 0.2, shape[0])
        mse = np.asarray((relative * random.uniform(0.01, 0.1)) ** 2, np.float64)
        shares = norms**2 / np.mean(norms**2)
        errors = {"relative": np.outer(relative, np.ones(len(norms))), "mse": np.outer(mse, shares)}
        each = errors if by_channel else {}
        own = kind or ("linear" if len(shape) == 2 else "conv2d")
        importance = float(np.prod(shape) * random.uniform(0.01, 0.1))
        layers.append(LayerStats(name, own, shape, 0, importance, norms, {"relative": relative, "mse": mse}, each))
    scheme = scheme or Affine(granularity="per_channel", range="mse")
    return LayerTable(tuple(layers), scheme, BITS, ("relative", "mse"), False, "sha256:synthetic", rest_bytes=1000)


def many_layers(count: int) -> Shapes:
    """So many small linear layers."""
    return [(f"blocks.{place // 4}.part{place % 4}", (16 + 16 * (place % 3), 32)) for place in range(count)]


def resnet152() -> Shapes:
    """The convolutions of ResNet-152, and its classifier."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("conv1", (64, 3, 7, 7))]
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (8, 128), (36, 256), (3, 512)), 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            shapes += [
                (f"{name}.conv1", (width, inputs, 1, 1)), (f"{name}.conv2", (width, width, 3, 3)),
                (f"{name}.conv3", (4 * width, width, 1, 1)),
            ]  # fmt: skip
            if block == 0:
                shapes.append((f"{name}.downsample.0", (4 * width, inputs, 1, 1)))
            inputs = 4 * width
    return [*shapes, ("fc", (1000, 2048))]


def llama_7b() -> Shapes:
    """The matrices of a language model of seven billion weights."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens", (32000, 4096))]
    for block in range(32):
        name = f"model.layers.{block}"
        shapes += [(f"{name}.self_attn.{one}_proj", (4096, 4096)) for one in "qkvo"]
        shapes += [(f"{name}.mlp.{one}_proj", (11008, 4096)) for one in ("gate", "up")]
        shapes.append((f"{name}.mlp.down_proj", (4096, 11008)))
    return [*shapes, ("lm_head", (32000, 4096))]
