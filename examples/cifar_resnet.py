"""CIFAR-10 ResNets and their data, as the examples and tests use them.

The weights are Y. Idelbayev's public ones (pytorch_resnet_cifar10, BSD-2), option A shortcuts. Their folder is
`$MPQ_ZOO/cifar10`; MPQ_ZOO defaults to ../shared/zoo.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq_plugins.checkpoints.checkpoint import open_checkpoint

ZOO = Path(os.environ.get("MPQ_ZOO", "../shared/zoo")) / "cifar10"
CHECKPOINTS = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without weights."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad = (outputs - inputs) // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.pad or self.stride > 1:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


class ResNet(nn.Module):
    """6n + 2 layers for CIFAR; (N, 3, 32, 32) -> (N, 10)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(y.mean(dim=(2, 3)))
        return logits


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(inputs, outputs, stride), *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))


def checkpoint(depth: int) -> Path:
    """The checkpoint file of ResNet-20 or ResNet-56."""
    return ZOO / CHECKPOINTS[depth]


def need_networks(parser: argparse.ArgumentParser) -> None:
    """Leave, saying why, where there are no pretrained networks."""
    if not checkpoint(20).exists():
        parser.exit(2, f"no pretrained networks at {ZOO}; set MPQ_ZOO to the folder that holds them\n")


def resnet(depth: int) -> ResNet:
    """The pretrained network, in evaluation mode."""
    net = ResNet((depth - 2) // 6)
    stored = open_checkpoint(checkpoint(depth))  # names without DataParallel's `module.`
    net.load_state_dict({name: tensor.tensor() for name, tensor in stored.items()})
    return net.eval()


def resnet20() -> ResNet:
    """Pretrained ResNet-20, for `mpq measure examples.cifar_resnet:resnet20`."""
    return resnet(20)


def resnet56() -> ResNet:
    """Pretrained ResNet-56."""
    return resnet(56)


def images(file: str = "test_846.npz") -> tuple[Tensor, Tensor]:
    """Preprocessed images (N, 3, 32, 32) and labels (N,)."""
    with np.load(ZOO / file) as stored:
        pixels, labels = torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"]).long()
    scaled = pixels.float().div(255).permute(0, 3, 1, 2)
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), labels


@torch.no_grad()
def evaluate(net: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 accuracy in percent and cross-entropy in nats."""
    logits = torch.cat([net(batch) for batch in inputs.split(128)])
    top1 = (logits.argmax(1) == labels).float().mean().item()
    return 100 * top1, F.cross_entropy(logits, labels).item()


def score(net: nn.Module) -> dict[str, float]:
    """Top-1 and cross-entropy on the test images, for `mpq sweep --eval examples.cifar_resnet:score`."""
    top1, loss = evaluate(net, *images())
    return {"top-1 %": top1, "cross-entropy": loss}


def calibration() -> list[Tensor]:
    """1,024 training images without labels, for `--calibrate examples.cifar_resnet:calibration`."""
    return list(images("calib_1024.npz")[0].split(128))
