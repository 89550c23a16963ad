"""Small networks as users write them: pieces (N, 4, 6, 6) -> (N, 4, 6, 6), each odd in its own way."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm


def conv(kind: type[nn.Conv2d] = nn.Conv2d, **settings: Any) -> nn.Conv2d:
    return kind(4, 4, 3, padding=1, **settings)


class Standardised(nn.Conv2d):
    """Convolves with what is left of its weight without the mean."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)
        return result


class Doubled(nn.Conv2d):
    """Has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Called(nn.Conv2d):
    """Computes as torch does, and has more to say."""

    note = "mine"

    def flipped(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.flip(3), padding=1)


class Normalised(nn.Module):
    """A convolution with its BatchNorm, called by keyword or not."""

    def __init__(self, layer: nn.Module, norm: nn.Module, keyword: bool = False) -> None:
        super().__init__()
        self.layer, self.norm, self.keyword = layer, norm, keyword

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.relu(self.norm(input=y) if self.keyword else self.norm(y))


class NormAndSum(Normalised):
    """A convolution that feeds a norm and a sum."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        result: Tensor = self.norm(y) + y
        return result


class FrozenNorm(nn.Module):
    """A functional norm of stored statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.register_buffer("gain", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        mean, var, gain = map(self.get_buffer, ("mean", "var", "gain"))
        return F.batch_norm(x, mean, var, gain)


class Asks(nn.Module):
    """Looks at its input's shape, which torch.fx cannot trace."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 4:
            raise ValueError("channels")
        y: Tensor = self.inner(x)
        return y


class Tied(nn.Module):
    """Goes back by the weight it came by."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.encode, self.norm = conv(), nn.BatchNorm2d(4) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(torch.relu(self.norm(self.encode(x))), self.encode.weight, padding=1)


def backwards(x: Tensor, layer: nn.Conv2d) -> Tensor:
    return F.conv_transpose2d(x, layer.weight, padding=1)


class Lends(nn.Module):
    """Lends its weight by way of a name, a helper or a list."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.how = nn.Sequential(conv()), how
        self.aside = [self.first[0]]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        if self.how == "helper":
            return backwards(y, self.first[0])  # type: ignore[arg-type]
        if self.how == "name":
            return backwards(y, getattr(self, "first")[0])  # noqa: B009
        layer: Any = self.first[0]
        weight: Any = self.aside[0].weight if self.how == "list" else layer.weight.data.squeeze()
        return F.conv_transpose2d(y, weight, padding=1)


class Reads(nn.Module):
    """Reads what a weight is like, and nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = conv()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.to(self.layer.weight.dtype).view(-1, self.layer.weight.shape[1], 6, 6))
        return y


class Twice(nn.Module):
    """One layer that works twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = conv()
        self.other = self.one

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(torch.relu(self.one(x)))
        return y


class Shares(nn.Module):
    """Two layers of one weight, one of them before a norm."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.one, self.other, self.norm = conv(), conv(), nn.BatchNorm2d(4) if norm else nn.Identity()
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(torch.relu(self.norm(self.one(x))))
        return y


class Flips(nn.Module):
    """Calls a method of its layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer: Any = conv(Called)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer.flipped(self.layer(x))
        return y


class Adapted(nn.Linear):
    """A low-rank adapter on a linear layer."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) + self.up(self.down(x))
        return y


class OnChannels(nn.Module):
    """Something that works on (N, tokens, 4)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        y: Tensor = self.inner(tokens)
        return y.transpose(1, 2).reshape(x.shape)


class Attends(nn.Module):
    """torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x)[0]
        return x + y


class Gated(nn.Module):
    """A parameter of its own as a kernel, and the layers of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.layers = nn.ModuleList([conv(), conv(groups=4)])

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.kernel)
        for layer in self.layers:
            y = torch.sigmoid(layer(x)) * y
        return y


def hooked(before: bool) -> nn.Module:
    layer = conv()
    if before:
        layer.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
    else:
        layer.register_forward_hook(lambda _, args, y: y + args[0])
    return layer


def patched() -> nn.Module:
    layer = conv()
    layer.forward = lambda x: F.conv2d(x, layer.weight, padding=1)  # type: ignore[assignment,method-assign]
    return layer


PIECES: dict[str, Callable[[], nn.Module]] = {
    "plain": conv,
    "circular": lambda: conv(padding_mode="circular"),
    "depthwise": lambda: conv(groups=4, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
    "transposed groups": lambda: Normalised(nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)),
    "norm": lambda: Normalised(conv(bias=False), nn.BatchNorm2d(4)),
    "norm by keyword": lambda: Normalised(conv(), nn.BatchNorm2d(4), keyword=True),
    "norm of the batch": lambda: Normalised(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
    "norm of the instance": lambda: Normalised(conv(), nn.InstanceNorm2d(4, affine=True)),
    "norm without gains": lambda: Normalised(conv(), nn.BatchNorm2d(4, affine=False)),
    "frozen norm": lambda: Normalised(conv(), FrozenNorm()),
    "norm and sum": lambda: NormAndSum(conv(), nn.BatchNorm2d(4)),
    "frozen norm and sum": lambda: NormAndSum(conv(), FrozenNorm()),
    "asks": lambda: Asks(Normalised(conv(), nn.BatchNorm2d(4))),
    "asks of two": lambda: Asks(NormAndSum(conv(), nn.BatchNorm2d(4))),
    "standardised": lambda: Normalised(conv(Standardised), nn.BatchNorm2d(4)),
    "doubled": lambda: Normalised(conv(Doubled), nn.BatchNorm2d(4)),
    "subclass": lambda: Normalised(conv(Called), nn.BatchNorm2d(4)),
    "flips": Flips,
    "hook": lambda: Normalised(hooked(before=False), nn.BatchNorm2d(4)),
    "hook before": lambda: Normalised(hooked(before=True), nn.BatchNorm2d(4)),
    "patched": lambda: Normalised(patched(), nn.BatchNorm2d(4)),
    "tied": lambda: Tied(norm=False),
    "tied with a norm": lambda: Tied(norm=True),
    "lends by helper": lambda: Lends("helper"),
    "lends by name": lambda: Lends("name"),
    "lends by list": lambda: Lends("list"),
    "lends its data": lambda: Lends("data"),
    "lends unseen": lambda: Asks(Lends("helper")),
    "reads": Reads,
    "twice": Twice,
    "shares": lambda: Shares(norm=False),
    "shares with a norm": lambda: Shares(norm=True),
    "adapter": lambda: OnChannels(Adapted()),
    "linear": lambda: OnChannels(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))),
    "attention": lambda: OnChannels(Attends()),
    "encoder": lambda: OnChannels(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)),
    "gated": Gated,
    "weight norm": lambda: Normalised(parametrizations.weight_norm(conv()), nn.BatchNorm2d(4)),
    "spectral norm": lambda: parametrizations.spectral_norm(conv()),
    "old weight norm": lambda: Normalised(weight_norm(conv()), nn.BatchNorm2d(4)),
}
PARAMETRIZED = ("weight norm", "spectral norm", "old weight norm")
INPUTS = (8, 4, 6, 6)


def odd_model(names: Sequence[str], seed: int) -> nn.Module:
    """The pieces in a row, seeded, with warm statistics and gains of either sign, in evaluation mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(PIECES[name]() for name in names)).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(INPUTS) * 1.5 + 0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.normal_(module.bias, 0, 0.3)
    model.eval()
    with torch.no_grad():
        model(torch.randn(INPUTS))
    return model


def parametrized(names: Sequence[str]) -> list[str]:
    """What a plan of these pieces has to leave out."""
    return [f"{number}*" for number, name in enumerate(names) if name in PARAMETRIZED]
