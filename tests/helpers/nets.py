"""Small networks the tests share."""

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Two foldable convolutions, a transposed one, a linear head; (N, 3, 8, 8) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(12)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.up(torch.relu(self.bn2(self.conv2(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class TiedNet(nn.Module):
    """An embedding whose weight the output layer shares, and a layer registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.block = nn.Linear(8, 8)
        self.again = self.block
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.again(self.block(self.embed(tokens))))
        return logits


def conv_net() -> ConvNet:
    """ConvNet with seeded weights and BatchNorm statistics far from 0 and 1."""
    torch.manual_seed(0)
    net = ConvNet().eval()
    with torch.no_grad():
        for norm in (net.bn1, net.bn2):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.2, 3)
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-1, 1)
    return net


def tied_net() -> TiedNet:
    """TiedNet with seeded weights."""
    torch.manual_seed(1)
    return TiedNet().eval()


def weight_of(net: nn.Module, name: str) -> Tensor:
    """A layer's weight."""
    weight = net.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
