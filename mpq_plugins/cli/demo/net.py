"""The demo's network, digits it was not trained on, and a few that it was.

Digits: images of the Optical Recognition of Handwritten Digits data set (E. Alpaydin, C. Kaynak, UCI
Machine Learning Repository, 1998, CC BY 4.0), 8 x 8 pixels of 0..16, as scikit-learn distributes them.
`examples/train_demo.py` makes both files.
"""

from importlib.resources import as_file, files

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = "digitnet.safetensors"
DIGITS = "digits.npz"


def _unit(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class DigitNet(nn.Module):
    """Five 3 x 3 convolutions with BatchNorm, global average pooling, one linear layer; (N, 1, 8, 8) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _unit(1, 16)
        self.body = nn.Sequential(_unit(16, 24), _unit(24, 24), nn.MaxPool2d(2), _unit(24, 48), _unit(48, 48))
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of 8 x 8 images scaled to 0..1."""
        features: Tensor = self.body(self.stem(images)).mean(dim=(2, 3))
        logits: Tensor = self.head(features)
        return logits


def digit_net() -> DigitNet:
    """The trained network, in evaluation mode."""
    net = DigitNet()
    with as_file(files(__package__) / WEIGHTS) as path:
        net.load_state_dict(load_file(path))
    return net.eval()


def calibration_digits() -> list[Tensor]:
    """Two batches of images (N, 1, 8, 8) in 0..1 that the network was trained on, to correct quantized copies on."""
    with as_file(files(__package__) / DIGITS) as path, np.load(path) as stored:
        images = torch.from_numpy(stored["calibration"]).float().unsqueeze(1) / 16
        return list(images.split(100))


def accuracy(net: nn.Module) -> dict[str, float]:
    """Score a network on the unseen digits: the share that it reads right, and its cross-entropy in nats."""
    images, labels = unseen_digits()
    with torch.no_grad():
        logits = net(images)
    right = float((logits.argmax(1) == labels).float().mean())
    return {"accuracy": right, "cross_entropy": float(F.cross_entropy(logits, labels))}


def unseen_digits() -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) in 0..1 and labels (N,) that the network has not seen."""
    with as_file(files(__package__) / DIGITS) as path, np.load(path) as stored:
        images = torch.from_numpy(stored["images"]).float().unsqueeze(1) / 16
        return images, torch.from_numpy(stored["labels"]).long()
