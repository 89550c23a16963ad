"""Train the demo's network on real handwritten digits and write the two files the package ships.

    python -m examples.train_demo [--epochs 40] [--output mpq_plugins/cli/demo]

1,000 of scikit-learn's 1,797 digits train it, and 200 of these are shipped to correct quantized networks on; the
other 797 are shipped to test it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor

from mpq_plugins.cli.demo.net import DIGITS, WEIGHTS, DigitNet

TRAINING_IMAGES = 1000
CALIBRATION_IMAGES = 200  # of those, shipped to correct quantized networks on
BATCH = 50


def split() -> tuple[tuple[Tensor, Tensor], tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images[order].astype(np.uint8), digits.target[order].astype(np.uint8)
    train = torch.from_numpy(images[:TRAINING_IMAGES]).float().unsqueeze(1) / 16
    return (train, torch.from_numpy(labels[:TRAINING_IMAGES]).long()), (
        images[TRAINING_IMAGES:],
        labels[TRAINING_IMAGES:],
    )


def shifted(images: Tensor) -> Tensor:
    """Each batch moved by up to one pixel either way: the writers did not centre their digits either."""
    dy, dx = torch.randint(-1, 2, (2,)).tolist()
    return torch.roll(images, (dy, dx), dims=(2, 3))


def train(images: Tensor, labels: Tensor, epochs: int) -> DigitNet:
    torch.manual_seed(0)
    net = DigitNet().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(shifted(images[batch])), labels[batch], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("mpq_plugins/cli/demo"))
    options = parser.parse_args()
    torch.set_num_threads(2)
    (images, labels), (test_images, test_labels) = split()
    net = train(images, labels, options.epochs)
    options.output.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), options.output / WEIGHTS)
    calibration = (images[:CALIBRATION_IMAGES, 0] * 16).round().to(torch.uint8).numpy()
    np.savez_compressed(options.output / DIGITS, images=test_images, labels=test_labels, calibration=calibration)
    with torch.no_grad():
        logits = net(torch.from_numpy(test_images).float().unsqueeze(1) / 16)
    accuracy = (logits.argmax(1) == torch.from_numpy(test_labels).long()).float().mean().item()
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {accuracy:.2%} on {len(test_labels)} test digits")


if __name__ == "__main__":
    main()
