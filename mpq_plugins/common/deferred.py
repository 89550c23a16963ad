"""A module that is imported when something is first asked of it.

Annotations in quotes may name what is in it, and whoever resolves them finds it (`typing.get_type_hints`), while
nothing else waits for it.
"""

from importlib import import_module
from typing import Any


class Deferred:
    """Stands for the module of that name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)
