"""Where the arithmetic runs: the CPU's compiled kernel, or torch on an accelerator."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..common.checks import shown
from ..common.text import first_sentence
from ..errors import SettingError

_OWN = threading.local()


def checked_device(device: object, here: bool = True, dtype: torch.dtype = torch.float64) -> torch.device | None:
    """A device that can compute here in a dtype, or if not `here` that there is such a kind of; None stays None.

    Raises SettingError.
    """
    if device is None:
        return None
    try:
        place: torch.device = torch.device(device)  # type: ignore[call-overload]  # checks it
        if here:
            torch.zeros(1, device=place, dtype=dtype).sum().cpu()
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        raise SettingError(
            f"device: {shown(device)} cannot be used ({first_sentence(error)}); 'cpu', or 'cuda' where there is one"
        ) from error
    return place


@contextmanager
def own_stream(device: torch.device | None) -> Iterator[None]:
    """On CUDA, a stream for each thread, so that one thread's copies and kernels run while another reads."""
    if device is None or device.type != "cuda":
        yield
        return
    if getattr(_OWN, "device", None) != device:
        _OWN.device, _OWN.stream = device, torch.cuda.Stream(device)
    with torch.cuda.stream(_OWN.stream):
        yield
