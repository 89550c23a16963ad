"""Neural Compressor without its chatter: its logging below errors kept from a user's terminal, for as long as asked."""

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = "neural_compressor"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what Neural Compressor logs below errors to itself. Its handlers and level stay as the user set them."""
    logger = logging.getLogger(LOGGER)  # importing Neural Compressor replaces the handlers, and leaves filters alone

    def is_error(record: logging.LogRecord) -> bool:  # one for each use, which may be inside another
        return record.levelno >= logging.ERROR

    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)


@contextmanager
def quiet_import() -> Iterator[None]:
    """The same while Neural Compressor is imported, and without the warnings about what it imports in its turn."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def refuse_module(name: str) -> None:
    """Raise ImportError where there is such a module: a package of another version."""
    if importlib.util.find_spec(name) is not None:
        raise ImportError(f"{name} is here")
