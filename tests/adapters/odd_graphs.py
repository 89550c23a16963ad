"""Networks put together at random of what stands between layers: torch.fx can trace them, and no two are alike.

Every operator takes images of SHAPE, two of the values so far, and gives images of SHAPE.
"""

import operator
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

C, SIZE = 6, 8
SHAPE = (8, C, SIZE, SIZE)
Build = Callable[[], Sequence[nn.Module]]
Run = Callable[..., Tensor]


class Standardised(nn.Conv2d):
    """A convolution by its weight less its mean, over its deviation."""

    def forward(self, x: Tensor) -> Tensor:
        w = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, padding=1)


class Doubling(nn.BatchNorm2d):
    """A BatchNorm that does more than its class."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def conv(kernel: int = 3, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(C, C, kernel, padding=kernel // 2, groups=groups, bias=bias)


def pruned() -> nn.Module:
    module: nn.Module = prune.l1_unstructured(conv(), "weight", 0.5)
    return module


def hooked() -> nn.Module:
    """A ReLU that gives twice what it should."""
    relu = nn.ReLU()
    relu.register_forward_hook(lambda _, __, output: 2 * output)
    return relu


def norm(**settings: bool) -> nn.Module:
    return nn.BatchNorm2d(C, **settings)


def chain(x: Tensor, _: Tensor, *modules: nn.Module) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def excite(x: Tensor, gate: Callable[[Tensor], Tensor], down: nn.Module, up: nn.Module) -> Tensor:
    squeezed = F.adaptive_avg_pool2d(x, 1)
    result: Tensor = x * gate(up(F.relu(down(squeezed))))
    return result


def attend(x: Tensor, q: nn.Module, k: nn.Module) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    weights = (q(tokens) @ k(tokens).transpose(-2, -1) / 3).softmax(-1)
    image: Tensor = (weights @ tokens).transpose(1, 2).reshape(-1, C, SIZE, SIZE)
    return image


def add_in_place(x: Tensor, y: Tensor) -> Tensor:
    x += 0.5 * y
    return x


def change_then_read(x: Tensor) -> Tensor:
    F.relu(x, inplace=True)
    return x


def change_a_view(x: Tensor) -> Tensor:
    flat = x.view(x.size(0), -1)
    flat.add_(0.5)
    return x


def split(x: Tensor) -> Tensor:
    first, second = torch.split(x, C // 2, dim=1)
    return torch.cat([second, first], dim=1)


def chunk(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=1)
    return torch.cat((first + second, first), 1)


def augmented(x: Tensor, y: Tensor) -> Tensor:
    x = x * 1
    x += y
    return x


NOTHING: Build = tuple
OPERATORS: dict[str, tuple[Build, Run]] = {
    # planned layers
    "conv": (lambda: [conv()], chain),
    "conv 1x1": (lambda: [conv(1, bias=False)], chain),
    "depthwise": (lambda: [conv(groups=C), norm()], chain),
    "conv norm": (lambda: [conv(bias=False), norm()], chain),
    "conv norm relu": (lambda: [conv(bias=False), norm(), nn.ReLU(True)], chain),
    "conv norm relu6": (lambda: [conv(bias=False), norm(), nn.ReLU6(True)], chain),
    "conv relu": (lambda: [conv(), nn.ReLU()], chain),
    "conv hooked": (lambda: [conv(), hooked()], chain),
    "conv batch statistics": (lambda: [conv(), norm(track_running_stats=False)], chain),
    "conv doubling": (lambda: [conv(), Doubling(C), nn.ReLU()], chain),
    "conv keyword": (lambda: [conv(), norm()], lambda x, _, c, n: F.relu(input=n(input=c(input=x)))),
    "norm and more": (lambda: [conv(), norm()], lambda x, _, c, n: (lambda y: n(y) + y)(c(x))),
    "linear": (lambda: [nn.Linear(SIZE, SIZE, bias=False), nn.ReLU()], chain),
    "broadcast": (lambda: [conv(1)], lambda x, _, c: x + c(F.adaptive_avg_pool2d(x, 1))),
    "cat": (lambda: [nn.Conv2d(2 * C, C, 1)], lambda x, y, c: c(torch.cat([x, y], 1))),
    "cat keyword": (lambda: [nn.Conv2d(2 * C, C, 1)], lambda x, y, c: c(torch.cat(tensors=[x, y], dim=1))),
    "excite": (lambda: [nn.Conv2d(C, 2, 1), nn.Conv2d(2, C, 1)], lambda x, _, *m: excite(x, torch.sigmoid, *m)),
    "excite hard": (lambda: [nn.Conv2d(C, 2, 1), nn.Conv2d(2, C, 1)], lambda x, _, *m: excite(x, F.hardsigmoid, *m)),
    "attention": (lambda: [nn.Linear(C, C), nn.Linear(C, C)], lambda x, _, *own: attend(x, *own)),
    "dtype of a weight": (lambda: [conv()], lambda x, _, c: c(x.to(c.weight.dtype))),
    # layers that are skipped
    "float conv": (lambda: [conv()], chain),
    "float conv norm relu": (lambda: [conv(), norm(), nn.ReLU()], chain),
    "float standardised": (lambda: [Standardised(C, C, 3), norm(), nn.ReLU()], chain),
    "float weight norm": (lambda: [weight_norm(conv()), norm(), nn.ReLU()], chain),
    "float spectral norm": (lambda: [spectral_norm(conv()), nn.ReLU()], chain),
    "float pruned": (lambda: [pruned(), norm(), nn.ReLU()], chain),
    "float reflect": (lambda: [nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect"), norm()], chain),
    "float transposed": (lambda: [nn.ConvTranspose2d(C, C, 3, padding=1), norm(), nn.ReLU()], chain),
    "float twice": (lambda: [conv(1), nn.ReLU()], lambda x, y, c, relu: relu(c(x)) + c(y)),
    "float lender": (lambda: [conv(1)], lambda x, y, c: F.relu(c(x)) + F.conv_transpose2d(y, c.weight)),
    # activations
    "relu": (NOTHING, lambda x, _: F.relu(x)),
    "relu keyword": (NOTHING, lambda x, _: F.relu(input=x)),
    "relu keyword module": (lambda: [nn.ReLU(), norm()], lambda x, _, relu, n: relu(input=n(input=x)).abs()),
    "masked": (NOTHING, lambda x, _: x.masked_fill(mask=x < 0, value=0.5)),
    "transpose keyword": (NOTHING, lambda x, _: x.transpose(dim0=2, dim1=3)),
    "relu method": (NOTHING, lambda x, _: x.relu()),
    "relu twice": (lambda: [nn.ReLU()], lambda x, y, relu: relu(relu(x) - y)),
    "relu6": (NOTHING, lambda x, _: F.relu6(x)),
    "clamp": (NOTHING, lambda x, _: x.clamp(-1, 3)),
    "hardtanh": (lambda: [nn.Hardtanh()], chain),
    "hardswish twice": (lambda: [nn.Hardswish()], lambda x, y, act: act(4 * x) + act(y)),
    "silu": (lambda: [nn.SiLU()], chain),
    "gelu": (NOTHING, lambda x, _: F.gelu(x)),
    "prelu": (lambda: [nn.PReLU(C)], chain),
    "leaky": (NOTHING, lambda x, _: F.leaky_relu(x, 0.1)),
    "elu": (lambda: [nn.ELU()], chain),
    "sigmoid": (lambda: [nn.Sigmoid()], chain),
    "tanh": (NOTHING, lambda x, _: torch.tanh(x)),
    "softmax": (lambda: [nn.Softmax(1)], chain),
    # norms
    "norm": (lambda: [norm()], chain),
    "norm relu": (lambda: [norm(), nn.ReLU()], chain),
    "group norm": (lambda: [nn.GroupNorm(2, C)], chain),
    "layer norm": (NOTHING, lambda x, _: F.layer_norm(x, (SIZE, SIZE))),
    "instance norm": (lambda: [nn.InstanceNorm2d(C)], chain),
    # sums and products
    "add": (NOTHING, operator.add),
    "add relu": (NOTHING, lambda x, y: F.relu(x + y)),
    "add to itself": (NOTHING, lambda x, _: x + x),
    "augmented": (NOTHING, augmented),
    "add alpha": (NOTHING, lambda x, y: torch.add(x, y, alpha=2)),
    "add in place": (NOTHING, lambda x, y: (x * 1).add_(y)),
    "add number": (NOTHING, lambda x, _: 2.5 + x),
    "subtract": (NOTHING, operator.sub),
    "multiply": (NOTHING, operator.mul),
    "divide": (NOTHING, lambda x, y: x / (y.abs() + 1)),
    "maximum": (NOTHING, torch.maximum),
    "matmul": (NOTHING, lambda x, y: x @ y / SIZE),
    "einsum": (NOTHING, lambda x, y: torch.einsum("nchw,nchv->ncwv", x, y) / SIZE),
    "stack": (NOTHING, lambda x, y: torch.stack([x, y]).mean(0)),
    "where": (NOTHING, lambda x, y: torch.where(x > 0, x, y)),
    # pools
    "max pool": (lambda: [nn.MaxPool2d(3, 1, 1)], chain),
    "max pool twice": (lambda: [nn.MaxPool2d(3, 1, 1)], lambda x, y, pool: pool(pool(x)) - pool(y)),
    "max pool function": (NOTHING, lambda x, _: F.max_pool2d(x, 2, 1, 1, 2, ceil_mode=False)),
    "max pool keywords": (NOTHING, lambda x, _: F.max_pool2d(input=x, kernel_size=3, stride=1, padding=1)),
    "max pool indices": (NOTHING, lambda x, _: F.max_pool2d(x, 3, 1, 1, return_indices=True)[0]),
    "average pool": (lambda: [nn.AvgPool2d(3, 1, 1)], chain),
    "mean": (NOTHING, lambda x, y: x - y.mean((2, 3), keepdim=True)),
    # shapes
    "flatten": (NOTHING, lambda x, _: torch.flatten(x, 1).view(-1, C, SIZE, SIZE)),
    "view": (NOTHING, lambda x, _: x.view(x.size(0), -1).reshape(x.shape[0], C, SIZE, SIZE)),
    "permute": (NOTHING, lambda x, _: x.permute(0, 3, 1, 2).permute(0, 2, 3, 1)),
    "transpose": (NOTHING, lambda x, _: x.transpose(2, 3)),
    "squeeze": (NOTHING, lambda x, _: x.unsqueeze(1).squeeze(1)),
    "index": (NOTHING, lambda x, _: x[:, [5, 4, 3, 2, 1, 0]]),
    "split": (NOTHING, lambda x, _: split(x)),
    "chunk": (NOTHING, lambda x, _: chunk(x)),
    "shuffle": (lambda: [nn.ChannelShuffle(2)], chain),
    "pixels": (NOTHING, lambda x, y: F.pixel_unshuffle(F.pixel_shuffle(torch.cat([x, y], 1), 2), 2)[:, 3 : 3 + C]),
    "pad": (NOTHING, lambda x, _: F.pad(x, (1, 0, 1, 0))[:, :, :-1, :-1]),
    "nearest": (NOTHING, lambda x, _: F.avg_pool2d(F.interpolate(x, scale_factor=2), 2)),
    "bilinear": (lambda: [nn.Upsample(scale_factor=2, mode="bilinear")], lambda x, _, up: F.max_pool2d(up(x), 2)),
    "bicubic": (NOTHING, lambda x, _: F.interpolate(x, size=(SIZE, SIZE), mode="bicubic")),
    "identity": (lambda: [nn.Identity()], chain),
    "dropout": (lambda: [nn.Dropout(0.3)], chain),
    "dropout function": (NOTHING, lambda x, _: F.dropout(x, 0.3, training=False)),
    # changes in place
    "change then read": (NOTHING, lambda x, _: change_then_read(x)),
    "change a view": (NOTHING, lambda x, _: change_a_view(x)),
    "change a shared one": (NOTHING, lambda x, y: x.relu_() + y),
    "change by a number": (NOTHING, lambda x, _: x.mul_(0.5)),
    "operator in place": (NOTHING, lambda x, y: add_in_place(x, y) + x),
    "given out": (NOTHING, lambda x, y: torch.sub(x, y, out=x * 1) + x),
    "hardtanh in place": (NOTHING, lambda x, _: F.hardtanh_(x, 0.0, 3.0)),
}  # fmt: skip
Steps = Sequence[tuple[str, int, int]]


class OddNet(nn.Module):
    """(8, 3, 8, 8) -> logits and a map. Steps are operators and the two values that they take, counted backwards."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, C, 3, padding=1), nn.Linear(C, 5)
        self.steps = tuple(steps)
        self.layers = nn.ModuleList(nn.ModuleList(OPERATORS[name][0]()) for name, _, _ in steps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, used = [self.stem(x)], set()
        for (name, back, other), own in zip(self.steps, self.layers, strict=True):
            first, second = (max(0, len(values) - 1 - steps) for steps in (back, other))
            used.add(first)  # an operator may have no use for the second
            assert isinstance(own, nn.ModuleList)
            values.append(OPERATORS[name][1](values[first], values[second], *own))
        image = values[-1]
        for number, value in enumerate(values[:-1]):
            if number not in used:
                image = torch.maximum(image, value)
        return self.head(F.adaptive_avg_pool2d(image, 1).flatten(1)), image

    def float_layers(self) -> list[str]:
        """The names of the layers that are to be skipped."""
        return [f"layers.{number}.0" for number, (name, _, _) in enumerate(self.steps) if name.startswith("float ")]


def odd_net(steps: Steps, seed: int) -> tuple[OddNet, Tensor]:
    """Such a net, with BatchNorms that have seen something, in evaluation mode, and images for it."""
    torch.manual_seed(seed)
    net = OddNet(steps).train()
    images = torch.randn(8, 3, SIZE, SIZE)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.momentum = None
    with torch.no_grad():
        for _ in range(2):
            net(torch.randn_like(images))
        for module in norms:
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, 0, 0.3)
        net.eval()(images)
    return net, images
