"""mpq-plugins: decide once how many bits every layer, and every channel inside it, deserves.

Importing this package imports neither torch nor an adapter; each comes with the first use of what needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        FormatError,
        MismatchError,
        MPQError,
        PluginError,
        SettingError,
        SourceError,
        VerifyError,
        WeightError,
    )
    from .scheme import Affine

__all__ = [
    "Affine",
    "FormatError",
    "MPQError",
    "MismatchError",
    "PluginError",
    "SettingError",
    "SourceError",
    "VerifyError",
    "WeightError",
]

_HOMES = {
    "Affine": "scheme",
    "FormatError": "errors",
    "MPQError": "errors",
    "MismatchError": "errors",
    "PluginError": "errors",
    "SettingError": "errors",
    "SourceError": "errors",
    "VerifyError": "errors",
    "WeightError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
