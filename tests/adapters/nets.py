"""Networks in which backends go wrong without a word, one trouble each."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Two convolutions with BatchNorm, one of them grouped, and a linear layer; (N, 3, 8, 8) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class Reused(SmallNet):
    """A convolution that works twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv2(self.conv1(x)))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class TwoNorms(SmallNet):
    """A convolution that feeds two BatchNorms."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        logits: Tensor = self.fc((self.bn1(y) + self.bn2(y) + self.conv2(y)).mean(dim=(2, 3)))
        return logits


class NormAndMore(SmallNet):
    """A convolution that feeds a BatchNorm and a sum."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        logits: Tensor = self.fc(self.conv2(self.bn1(y) + y).mean(dim=(2, 3)))
        return logits


class LinearNorm(nn.Module):
    """A linear layer with a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.fc = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(self.first(x)))
        return logits


class Circular(SmallNet):
    """A convolution that pads with what it sees on the other side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=4, padding_mode="circular")


class Lending(SmallNet):
    """A layer that is called, and whose weight is used by a functional call too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x)).mean(dim=(2, 3))
        logits: Tensor = self.fc(y) + F.linear(y, self.fc.weight)
        return logits


class Functional(SmallNet):
    """A layer whose weight is used by a functional call."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x)).mean(dim=(2, 3))
        return F.linear(y, self.fc.weight, self.fc.bias)


class OwnWeight(SmallNet):
    """A functional convolution without a bias, of a parameter that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.conv2d(x, self.kernel))


class Attention(nn.Module):
    """MultiheadAttention, whose output layer is never called as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.attention(x, x, x)[0])
        return logits


class OwnLinear(nn.Linear):
    """A user's own subclass."""


class Subclassed(SmallNet):
    """A layer of a user's own class."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = OwnLinear(8, 10)


class Branching(SmallNet):
    """Control flow that depends on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class Tied(nn.Module):
    """Two linear layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(self.first(x))
        return logits


class Transposed(nn.Module):
    """A transposed convolution with different numbers of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        image: Tensor = self.up(x)
        return image


def made(net: type[nn.Module]) -> nn.Module:
    """Seeded, with BatchNorm statistics far from 0 and 1, in evaluation mode."""
    torch.manual_seed(0)
    model = net().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.2, 3)
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(-1, 1)
    return model
