"""Odd models: networks put together from what users' models are made of and torch's own classes are not.

Every block keeps the shape (samples, CHANNELS, 6, 6), so that any blocks follow each other in any order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

CHANNELS = 6


class Standardised(nn.Conv2d):
    """As in NF-nets and BiT: the weight is standardised in the forward."""

    def forward(self, input: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (self.weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(input, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Inside(nn.Conv2d):
    """Standardised where torch's forward looks it up."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(x, weight / (1e-5 + weight.norm()), bias)
        return y


class Rectified(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class Same(nn.Conv2d):
    """A subclass that computes as its parent does."""

    def extra_repr(self) -> str:
        return "computes as its parent does"


class Called(nn.Conv2d):
    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return torch.tanh(super().__call__(*args, **kwargs))


class Branching(nn.Conv2d):
    """Cannot be traced."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y if bool(y.mean() > 1e6) else y * 0.5


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class OfBatch(nn.BatchNorm2d):
    """Normalises by its batch whatever mode it is in."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)


class Stubborn(nn.BatchNorm2d):
    """Stays in training mode, as where it adapts to the test data."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.0)

    def train(self, mode: bool = True) -> "Stubborn":
        super().train(True)
        return self


class Shifted(nn.BatchNorm2d):
    """Uses its statistics otherwise."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        return input + self.running_mean.view(1, -1, 1, 1)


class Frozen(nn.Module):
    """As detectron2's: a BatchNorm by a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(CHANNELS) + 0.5)
        self.register_buffer("bias", torch.randn(CHANNELS))
        self.register_buffer("running_mean", torch.randn(CHANNELS))
        self.register_buffer("running_var", torch.rand(CHANNELS) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False)  # type: ignore[arg-type]


class Positive(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.abs()


def conv(kind: type[nn.Conv2d] = nn.Conv2d, **options: object) -> nn.Conv2d:
    return kind(CHANNELS, CHANNELS, 3, padding=1, **options)  # type: ignore[arg-type]


def hooked(hook: Callable[..., object], before: bool = False) -> nn.Conv2d:
    layer = conv()
    (layer.register_forward_pre_hook if before else layer.register_forward_hook)(hook)
    return layer


def patched() -> nn.Conv2d:
    layer = conv()
    # A method: a function around the layer itself would compute with its weights in every copy, which is refused.
    forward = MethodType(lambda own, input: nn.Conv2d.forward(own, input).clamp(-1, 1), layer)
    layer.forward = forward  # type: ignore[method-assign]
    return layer


def pruned() -> nn.Conv2d:
    layer = conv()
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


def positive() -> nn.Conv2d:
    layer = conv()
    parametrize.register_parametrization(layer, "weight", Positive())
    return layer


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": conv,
    "plain, no bias": lambda: conv(bias=False),
    "depthwise": lambda: conv(groups=CHANNELS),
    "circular": lambda: conv(padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1),
    "transposed, groups": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1, groups=2),
    "same": lambda: conv(Same),
    "standardised": lambda: conv(Standardised),
    "standardised inside": lambda: conv(Inside),
    "rectified": lambda: conv(Rectified),
    "called": lambda: conv(Called),
    "branching": lambda: conv(Branching),
    "hooked": lambda: hooked(lambda module, args, output: output * 2 - 1),
    "hooked before": lambda: hooked(lambda module, args: (args[0].abs(),) if args else None, before=True),
    "patched": patched,
    "weight norm": lambda: parametrizations.weight_norm(conv()),
    "spectral norm": lambda: parametrizations.spectral_norm(conv()),
    "spectral norm, old": lambda: spectral_norm(conv()),
    "pruned": pruned,
    "positive": positive,
}
PARAMETRIZED = {"weight norm", "spectral norm", "spectral norm, old", "pruned", "positive"}

NORMS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "plain": lambda: nn.BatchNorm2d(CHANNELS),
    "not affine": lambda: nn.BatchNorm2d(CHANNELS, affine=False),
    "without statistics": lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    "with activation": lambda: NormAct(CHANNELS),
    "of its batch": lambda: OfBatch(CHANNELS),
    "in training mode": lambda: Stubborn(CHANNELS),
    "shifted": lambda: Shifted(CHANNELS),
    "functional": Frozen,
    "synchronised": lambda: nn.SyncBatchNorm(CHANNELS),
    "group": lambda: nn.GroupNorm(2, CHANNELS),
    "instance": lambda: nn.InstanceNorm2d(CHANNELS, track_running_stats=True),
}


class Wiring(nn.Module):
    """How a layer and its norm are called."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.layer(x))
        return y


class ByName(Wiring):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.norm, nn.BatchNorm2d | nn.GroupNorm) and isinstance(self.layer, nn.Conv2d):
            y: Tensor = self.norm(input=self.layer(input=x))
            return y
        return super().forward(x)


class Residual(Wiring):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x)) + x


class Read(Wiring):
    """The layer's output goes elsewhere too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        result: Tensor = self.norm(y) + y
        return result


class Twice(Wiring):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(super().forward(x)))


class NormTwice(Wiring):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(torch.tanh(self.norm(self.layer(x))))
        return y


class Tied(Wiring):
    """An autoencoder's decoder takes the encoder's weight."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(super().forward(x))
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        groups: int = self.layer.groups  # type: ignore[assignment]
        return F.conv_transpose2d(y, weight, padding=1, groups=groups)


class Peeking(Wiring):
    """Reads a weight's dtype and no value of it."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return super().forward(x.to(weight.dtype))


class BiasLent(Wiring):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        bias = getattr(self.layer, "bias", None)
        return y if bias is None else y + bias.view(1, -1, 1, 1)


class StatisticsLent(Wiring):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        mean = getattr(self.norm, "running_mean", None)
        return y if mean is None else y - mean.view(1, -1, 1, 1)


class Keeping(Wiring):
    """Keeps what it gives, as models with a cache or features to look at do."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept * 1.0


class Aside(Wiring):
    """Calls what a plain list holds."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__(layer, norm)
        self.steps = [layer, norm]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class SharedBy(Wiring):
    """Another layer has the same weight."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__(layer, norm)
        self.other = conv(bias=False)
        weight = layer._parameters.get("weight")
        if weight is not None and weight.shape == self.other.weight.shape:
            self.other.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(torch.tanh(super().forward(x)))
        return y


class Decoder(nn.Conv2d):
    """A layer of its own that holds another aside and uses its weight."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__(CHANNELS, CHANNELS, 3, padding=1)
        self.other: list[Any] = [other]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) + F.conv2d(x, self.other[0].weight, padding=1, groups=self.other[0].groups)
        return y


class HeldBy(Wiring):
    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__(layer, norm)
        self.decoder = Decoder(layer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(torch.tanh(super().forward(x)))
        return y


class Counting(Wiring):
    """Writes into a buffer of its own."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__(layer, norm)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        return super().forward(x)


class Adapting(Wiring):
    """Has its norm normalise by the batch for as long as it runs."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.norm.training
        self.norm.train()
        y = super().forward(x)
        self.norm.train(before)
        return y


WIRINGS: dict[str, type[Wiring]] = {
    cls.__name__: cls
    for cls in (
        Wiring, ByName, Residual, Read, Twice, NormTwice, Tied, Peeking, BiasLent, StatisticsLent, Keeping, Aside,
        SharedBy, HeldBy, Counting, Adapting,
    )
}  # fmt: skip


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 16 * F.linear(F.normalize(x), F.normalize(self.weight))


class LowRank(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) + self.up(self.down(x))
        return y


class Gained(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(self.in_features) * super().forward(x)


HEADS: dict[str, type[nn.Linear]] = {cls.__name__: cls for cls in (nn.Linear, Cosine, LowRank, Gained)}


@dataclass(frozen=True)
class Recipe:
    """What a model is made of: (convolution, norm, wiring) for each block, its head, and the seed of its weights."""

    blocks: tuple[tuple[str, str, str], ...]
    head: str
    seed: int

    def build(self) -> "OddNet":
        """The model in evaluation mode, with statistics from data."""
        torch.manual_seed(self.seed)
        made = [WIRINGS[wiring](CONVOLUTIONS[layer](), NORMS[norm]()) for layer, norm, wiring in self.blocks]
        net = OddNet(nn.Sequential(*made), HEADS[self.head](CHANNELS, 5))
        net.train()
        with torch.no_grad():
            for _ in range(4):
                net(inputs(1.5))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.affine:
                nn.init.uniform_(module.weight, 0.3, 2.5)
                nn.init.normal_(module.bias, 0, 0.3)
        return net.eval()

    @property
    def skip(self) -> list[str]:
        """Layers that have no stored weight to quantize."""
        return [f"body.{k}.layer" for k, (layer, _, _) in enumerate(self.blocks) if layer in PARAMETRIZED]


class OddNet(nn.Module):
    """Blocks, and a head over their mean; (N, CHANNELS, 6, 6) -> (N, 5)."""

    def __init__(self, body: nn.Sequential, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x).mean((2, 3)))
        return y


def inputs(scale: float = 1.0) -> Tensor:
    """A batch."""
    return torch.randn(8, CHANNELS, 6, 6) * scale


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any blocks in any order."""
    block = st.tuples(st.sampled_from(list(CONVOLUTIONS)), st.sampled_from(list(NORMS)), st.sampled_from(list(WIRINGS)))
    blocks = draw(st.lists(block, min_size=1, max_size=3))
    return Recipe(tuple(blocks), draw(st.sampled_from(list(HEADS))), draw(st.integers(0, 2**16)))
