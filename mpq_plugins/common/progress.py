"""How long work says how far it is."""

from collections.abc import Callable

from ..errors import SettingError
from .checks import shown

Progress = Callable[[str, int, int], None]
"""Called with what is being done, as a layer's name, how much of it is done and how much there is, at most."""


def part_of(progress: Progress, position: int, parts: int) -> Progress:
    """What one of several pieces of equal work reports to, as if they were one; only the last of them ends it."""

    def report(name: str, done: int, total: int) -> None:
        if name or position == parts - 1:
            progress(name, position * total + done, parts * total)

    return report


def check_callbacks(**callbacks: object) -> None:
    """Raise SettingError for what cannot be called, by its name."""
    for name, callback in callbacks.items():
        if callback is not None and not callable(callback):
            raise SettingError(f"{name}: {shown(callback)} cannot be called; a function, or None")
