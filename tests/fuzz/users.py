"""What users name on the command line, and how it can fail."""

import os
import sys
from typing import Any, Never

import torch
from torch import nn


class Weird(BaseException):
    """No Exception."""

    def __str__(self) -> str:
        raise ValueError("\x1b[31m")


def raises(*_: Any) -> Never:
    """Fail with a message that a terminal would obey."""
    raise ValueError("\x1b[2J\nmpq: error: false")


def leaves(*_: Any) -> Never:
    """End the program, or try."""
    sys.exit(0)


def weird(*_: Any) -> Never:
    """Raise what hardly anything catches."""
    raise Weird


def deep(*_: Any) -> Any:
    """Recurse without end."""
    return deep()


def moves(*_: Any) -> nn.Module:
    """Print, and change the working directory."""
    print("\x1b[31mprinted")
    os.chdir("/")
    return net()


def net() -> nn.Module:
    """A tiny network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))


def batches() -> list[torch.Tensor]:
    """Inputs for it."""
    torch.manual_seed(0)
    return [torch.randn(4, 6), torch.randn(4, 6)]


def score(*_: Any) -> float:
    """The same for all."""
    return 0.5


def runs(model: nn.Module) -> float:
    """A score that runs the model."""
    model(batches()[0])
    return 0.5
