"""nncodec, Fraunhofer HHI's codec of the standard ISO/IEC 15938-17, as a comparison: its files, at its defaults.

It is no dependency: `pip install nncodec` builds it from C++. Where it is missing, examples say so and leave it out.
"""

import contextlib
import importlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

COARSEST, FINEST = 8, -40
"""Of its quantization parameter, four to an octave of the step."""


@dataclass(frozen=True, eq=False)
class Coded:
    """A bitstream, and its bits for each of the weights that are meant: all of it but what other tensors take."""

    data: bytes
    bits: float


def installed() -> bool:
    """Whether it is there, with what it needs itself."""
    try:
        _codec()
    except ImportError:
        return False
    return True


def coder(net: nn.Module, weights: set[str], whole: bool = True) -> Callable[[int], Coded]:
    """From a quantization parameter to the net's file; weights: what bits are counted of; whole: with all else."""
    tensors = {
        name: np.ascontiguousarray(value.float().numpy())
        for name, value in net.state_dict().items()
        if value.is_floating_point() and (whole or name in weights)
    }
    others = {name: value for name, value in tensors.items() if name not in weights}
    count = sum(value.size for name, value in tensors.items() if name in weights)

    def coded(qp: int) -> Coded:
        data = _encoded(tensors, qp)
        beside = len(_encoded(others, qp)) if others else 0
        return Coded(data, 8 * (len(data) - beside) / count)

    return coded


def nearest(coded: Callable[[int], Coded], bits: float) -> Coded:
    """The file nearest to so many bits: its sizes are a quarter of an octave of the step apart."""
    found: dict[int, Coded] = {}

    def at(qp: int) -> Coded:
        if qp not in found:
            found[qp] = coded(qp)
        return found[qp]

    low, high = FINEST, COARSEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle).bits > bits else (low, middle)
    return min((at(low), at(high)), key=lambda one: abs(one.bits - bits))


def decoded(data: bytes, net: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict for the net, what is not in floating point as it is."""
    state = net.state_dict()
    made: dict[str, Any] = _quietly(lambda: _codec().decode(bytearray(data)))
    return {
        name: torch.from_numpy(np.array(made[name])).reshape(value.shape) if name in made else value
        for name, value in state.items()
    }


def _encoded(tensors: dict[str, np.ndarray[Any, Any]], qp: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return bytes(_quietly(lambda: _codec().encode(tensors, {"qp": qp, "results": folder, "verbose": False})))


def _codec() -> Any:
    return importlib.import_module("nncodec.nn")


def _quietly(work: Callable[[], Any]) -> Any:
    """What it gives back, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return work()
