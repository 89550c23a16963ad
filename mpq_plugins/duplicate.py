"""A copy of a user's model, or an error that says what in it cannot be copied."""

import copy
from typing import TYPE_CHECKING, Any

from .errors import SettingError, what_it_said

if TYPE_CHECKING:
    from torch import nn


def duplicate(model: "nn.Module") -> "nn.Module":
    """A deep copy. Raises SettingError, naming what torch cannot copy, such as an output that a module keeps."""
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a user's module may hold anything
        raise SettingError(
            f"{type(model).__name__}: cannot be copied, and it is never changed itself: {_culprit(model, error)}"
        ) from error


def _culprit(model: "nn.Module", error: Exception) -> str:
    """What of a model cannot be copied, and what to do about it; where only the whole cannot, what the copy said."""
    for prefix, module in model.named_modules():
        for name, value in _held(module).items():
            try:
                copy.deepcopy(value)
            except Exception as own:  # noqa: BLE001  # looked for
                where = f"{prefix}.{name}" if prefix else name
                return f"{where!r} is a {type(value).__name__} ({what_it_said(own)}). {_remedy(value)}"
    return f"{what_it_said(error)}. Remove what it keeps of earlier runs, or parametrizations"


def _held(module: "nn.Module") -> dict[str, Any]:
    """What a module holds itself, by name, but for its children."""
    own = {name: value for name, value in vars(module).items() if name not in ("_modules", "_parameters", "_buffers")}
    return {**own, **module._parameters, **module._buffers}


def _remedy(value: Any) -> str:
    """A tensor that was computed has the graph of that run, which is not copied."""
    if getattr(value, "grad_fn", None) is not None:
        return (
            "It was computed in an earlier run: run the model once under torch.no_grad() (weight_norm and "
            "spectral_norm of torch.nn.utils keep their weight so), or detach it"
        )
    return "Set it to None while the model is copied, or make it where it is needed"
