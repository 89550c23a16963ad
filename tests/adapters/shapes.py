"""The shapes of networks that users bring, a few channels wide."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(inner: int, outer: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without a bias, and its BatchNorm."""
    conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outer)]


class BasicBlock(nn.Module):
    """ResNet-18's: two convolutions beside the identity, or beside a convolution of one pixel."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(inner, outer, 3, stride)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv_norm(outer, outer)
        self.downsample = nn.Sequential(*conv_norm(inner, outer, 1, stride)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class ResNet18(nn.Module):
    """Stem with a max pooling, four stages of two blocks; (N, 3, 32, 32) -> (N, 10)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(3, width, 7, 2)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        stages = [
            nn.Sequential(BasicBlock(inner, outer, 1 + (inner < outer)), BasicBlock(outer, outer, 1))
            for inner, outer in pairwise(widths)
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


class InvertedResidual(nn.Module):
    """MobileNetV2's and EfficientNet-Lite's: widen, look around in each channel, narrow; the sum is not cut off."""

    def __init__(self, inner: int, outer: int, stride: int, widen: int, kernel: int = 3) -> None:
        super().__init__()
        hidden = inner * widen
        wide = [*conv_norm(inner, hidden, 1), nn.ReLU6(inplace=True)] if widen > 1 else []
        deep = [*conv_norm(hidden, hidden, kernel, stride, hidden), nn.ReLU6(inplace=True)]
        self.conv = nn.Sequential(*wide, *deep, *conv_norm(hidden, outer, 1))
        self.shortcut = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.shortcut else out


class MobileNetV2(nn.Module):
    """(N, 3, 32, 32) -> (N, 10)."""

    blocks: tuple[tuple[int, int, int, int, int], ...] = (
        (8, 4, 1, 1, 3), (4, 8, 2, 4, 3), (8, 8, 1, 4, 3), (8, 12, 2, 4, 3), (12, 12, 1, 4, 3), (12, 16, 1, 4, 3),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        body = [InvertedResidual(inner, outer, stride, widen, k) for inner, outer, stride, widen, k in self.blocks]
        last = self.blocks[-1][1]
        self.features = nn.Sequential(
            *conv_norm(3, 8, 3, 2), nn.ReLU6(inplace=True), *body, *conv_norm(last, 64, 1), nn.ReLU6(inplace=True)
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        logits: Tensor = self.classifier(x.reshape(x.shape[0], -1))
        return logits


class EfficientNetLite(MobileNetV2):
    """MobileNetV2's blocks with kernels of 5, no squeezing and excitation."""

    blocks = (
        (8, 4, 1, 1, 3), (4, 6, 2, 6, 3), (6, 6, 1, 6, 3), (6, 8, 2, 6, 5), (8, 8, 1, 6, 5), (8, 12, 1, 6, 5),
        (12, 12, 1, 6, 5),
    )  # fmt: skip


class Twice(nn.Sequential):
    """U-Net's step: twice a convolution, a norm and a ReLU."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(*conv_norm(inner, outer), nn.ReLU(), *conv_norm(outer, outer), nn.ReLU())


class UNet(nn.Module):
    """Down twice, up twice by interpolation, every height joined to its own; (N, 3, 32, 32) -> (N, 2, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down1, self.down2 = Twice(3, 8), Twice(8, 16), Twice(16, 16)
        self.up1, self.up2, self.out = Twice(32, 8), Twice(16, 8), nn.Conv2d(8, 2, 1)
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)

    def forward(self, x: Tensor) -> Tensor:
        top = self.enter(x)
        middle = self.down1(self.pool(top))
        low = self.down2(self.pool(middle))
        middle = self.up1(torch.cat([middle, self.up(low)], dim=1))
        mask: Tensor = self.out(self.up2(torch.cat([top, F.interpolate(middle, scale_factor=2.0)], dim=1)))
        return mask


def warm(net: Callable[[], nn.Module], images: Tensor, seed: int = 0) -> nn.Module:
    """Seeded, its BatchNorms with statistics of such images and gains far from 1, in evaluation mode."""
    torch.manual_seed(seed)
    model = net().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, 0.3, 0.2)
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn_like(images) + 0.3)
    return model.eval()
