"""What the tests of Neural Compressor's two APIs share."""

import logging

from torch import nn


class Heard(logging.Handler):
    """What gets past the filters of Neural Compressor's logger."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same state, to the bit."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)
