"""mpq-plugins: decide once how many bits every layer, and every channel inside it, deserves.

    table = measure(model_or_path)

Importing this package imports neither torch nor an adapter; each comes with the first use of what needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# It shares its name with the sub-package it lives in, so it is bound here before anything else
# can bind the sub-package; it imports torch only when called.
from .measure import measure

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
    from .table import LayerStats, LayerTable
    from .weights import find_weights, iter_weights

__all__ = [
    "Affine",
    "FormatError",
    "LayerStats",
    "LayerTable",
    "MPQError",
    "MismatchError",
    "PluginError",
    "SettingError",
    "SourceError",
    "VerifyError",
    "WeightError",
    "find_weights",
    "iter_weights",
    "measure",
]

_HOMES = {
    "Affine": "scheme",
    "FormatError": "errors",
    "LayerStats": "table",
    "LayerTable": "table",
    "MPQError": "errors",
    "MismatchError": "errors",
    "PluginError": "errors",
    "SettingError": "errors",
    "SourceError": "errors",
    "VerifyError": "errors",
    "WeightError": "errors",
    "find_weights": "weights",
    "iter_weights": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
