"""Evaluations that processes can be sent, and some that go wrong there."""

import os
import signal
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.helpers.nets import conv_net

EXACT = conv_net()


def inputs(count: int = 3) -> list[Tensor]:
    """Batches for conv_net, of different sizes."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float32) for size in (16, 12, 20)[:count]]


def agreement(model: nn.Module) -> dict[str, float]:
    """How close a model's outputs are to the float model's: what any change in the last bit changes."""
    with torch.no_grad():
        (batch,) = inputs(1)
        outputs = model(batch).double()
        difference = outputs - EXACT(batch)
    return {"agreement": -float(difference.square().sum()), "first": float(outputs[0, 0])}


def in_modes(model: nn.Module) -> dict[str, float]:
    """What modes of the thread that it runs in change."""
    (batch,) = inputs(1)
    outputs = model(batch.float())
    return {"sum": float(outputs.detach().double().sum()), "gradients": float(outputs.requires_grad),
            "digits": float(torch.finfo(torch.ones(1).div(3).dtype).bits)}  # fmt: skip


def fails_below_three_bits(model: nn.Module) -> float:
    """An evaluation with a fault of its own, for coarse weights alone."""
    weight = model.get_submodule("conv1").weight
    assert isinstance(weight, Tensor)
    if weight[0].unique().numel() <= 4:
        raise ValueError("too coarse for me")
    return 1.0


def ends_its_process(model: nn.Module) -> float:
    """As the system ends a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def ends_one_process(model: nn.Module) -> dict[str, float]:
    """The same, but only where the file that MPQ_TEST_ONCE names is still there: once."""
    try:
        Path(os.environ["MPQ_TEST_ONCE"]).unlink()
    except FileNotFoundError:
        return agreement(model)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}
