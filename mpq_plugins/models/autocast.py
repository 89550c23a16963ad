"""The caller's autocast: a model runs under it in other threads too, and what is computed of a model does not."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

DEVICES = ("cpu", "cuda")  # that are asked about
Autocast = tuple[tuple[str, torch.dtype], ...]
"""To which dtype, by device, where it is on."""


def autocast_now() -> Autocast:
    """This thread's."""
    return tuple((of, torch.get_autocast_dtype(of)) for of in DEVICES if torch.is_autocast_enabled(of))


@contextmanager
def under_autocast(autocast: Autocast) -> Iterator[None]:
    """This one in this thread, and no other."""
    with ExitStack() as stack:
        for device in DEVICES:
            wanted = dict(autocast).get(device)
            if wanted is not None or torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, wanted, enabled=wanted is not None))
        yield


@contextmanager
def own_arithmetic() -> Iterator[None]:
    """Products in the dtype of what is multiplied. Around functions, not generators, whose caller it would reach."""
    with under_autocast(()):
        yield


def forget_casts() -> None:
    """Autocast keeps a weight's cast as long as it is on, and would compute with it where the weight is another now."""
    if autocast_now():
        torch.clear_autocast_cache()
