"""Whether arguments are what they are called: a module, a source of weights. plans/arguments.py says it of plans."""

from os import PathLike
from typing import TYPE_CHECKING

from ..common.deferred import Deferred
from ..errors import SettingError

if TYPE_CHECKING:
    import torch
else:
    torch = Deferred("torch")


def check_module(model: object, name: str = "model") -> None:
    """Raise SettingError where an argument of this name is no module."""
    if isinstance(model, torch.nn.Module):
        return
    if isinstance(model, type) and issubclass(model, torch.nn.Module):
        raise SettingError(f"{name}: is the class {model.__name__}, no module; give one that is made of it")
    raise SettingError(f"{name}: is a {type(model).__name__}, no module; give the network itself")


def check_source(source: object, name: str = "source") -> None:
    """Raise SettingError where an argument of this name is neither a module nor a path."""
    if isinstance(source, torch.nn.Module | str | PathLike):
        return
    raise SettingError(
        f"{name}: is a {type(source).__name__}, neither a module nor a path; give the network itself, or its "
        "checkpoint's path"
    )
