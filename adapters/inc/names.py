"""Which layers a configuration is for: Neural Compressor's names and types, matched exactly or not at all."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from mpq_plugins.common.checks import shown as one_line
from mpq_plugins.common.text import first_few
from mpq_plugins.errors import MismatchError, SettingError

from ..shared.compressor_quiet import quiet_import, refuse_module

try:
    with quiet_import():
        refuse_module("neural_compressor.strategy")  # of 3.7 and earlier, which have an older torch part
        from neural_compressor.common.utils import DEFAULT_WHITE_LIST, EMPTY_WHITE_LIST
        from neural_compressor.torch.algorithms.weight_only.modules import WeightOnlyLinear
except ImportError as error:
    raise ImportError(
        "Neural Compressor 3.8 or later is not here: pip install 'mpq-plugins[inc]', or use "
        "mpq_plugins.adapters.inc_classic with 3.7 or earlier"
    ) from error

BY_TYPE = "type:"
"""What begins the name of a module type where a configuration is JSON."""


def check_float(model: nn.Module) -> None:
    """Raise SettingError for a model that is quantized already."""
    packed = [name for name, module in model.named_modules() if isinstance(module, WeightOnlyLinear)]
    if hasattr(model, "mpq_plan") or packed:
        raise SettingError(f"{type(model).__name__}: is quantized already; start from the float model, or a copy of it")


def checked_white_list(value: Any) -> Any:
    """Neural Compressor's `*`, None, or a list of names and module types. Raises SettingError."""
    if value in (DEFAULT_WHITE_LIST, EMPTY_WHITE_LIST):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(item, str | type) for item in value):
        return list(value)
    raise SettingError(f"white_list: {one_line(value)} is not allowed; a list of names or module types, '*' or None")


def matching(key: Any, layers: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The layers that a local configuration is for: by type, or by a regex on the name as the compressor matches it."""
    if not isinstance(key, str):
        hits = [layer for layer in layers if layer[1] == getattr(key, "__name__", "")]
    elif key.startswith(BY_TYPE):
        hits = [layer for layer in layers if layer[1] == key.removeprefix(BY_TYPE)]
    else:
        try:
            hits = [layer for layer in layers if re.match(key, layer[0])]
        except re.error as error:
            raise SettingError(f"{key!r}, in set_local or white_list: is no regular expression ({error})") from error
        loose = [repr(name) for name, _ in hits if not re.fullmatch(key, name)]
        if loose:
            exact = (
                f"{f'^{re.escape(key)}$'!r} for that layer alone, or " if any(key == name for name, _ in hits) else ""
            )
            raise SettingError(
                f"{key!r}, in set_local or white_list: would take {first_few(loose, ', ')} too, by the start of the "
                f"name; write {exact}{f'{key}.*'!r} for all of them"
            )
    if not hits:
        names = ", ".join(repr(name) for name, _ in layers[:3])
        raise MismatchError(f"{shown(key)}, in set_local or white_list: matches no layer; names look like {names}")
    return hits


def shown(key: Any) -> str:
    """A name in quotes, or a type's."""
    return repr(key) if isinstance(key, str) else getattr(key, "__name__", repr(key))
