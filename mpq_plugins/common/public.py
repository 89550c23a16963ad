"""Public classes are called by the name that users import them by."""

from typing import TypeVar

Class = TypeVar("Class", bound=type)


def public(cls: Class) -> Class:
    """A class that calls itself `mpq_plugins.NAME`, in tracebacks and pickles too, wherever it is defined."""
    cls.__module__ = "mpq_plugins"
    return cls
