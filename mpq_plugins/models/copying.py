"""A copy of a user's model, or an error that says what in it cannot be copied.

Functions are never copied. One that was put in the place of a forward, or hooked to a module, and was made around some
module of the model would make the copy compute with the original's weights, whatever becomes of its own.
"""

import copy
from collections.abc import Iterable, Iterator
from functools import partial
from inspect import isfunction
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from ..common.text import what_it_said
from ..errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor, nn


def duplicate(model: "nn.Module", kept: "Iterable[Tensor]" = ()) -> "nn.Module":
    """A deep copy. kept: tensors of the model that the copy has too, instead of copies of them.

    Raises SettingError, naming what torch cannot copy, such as an output that a module keeps, or a function that would
    go on with the original's weights.
    """
    for name, function, held in _bound_to_the_original(model):
        raise SettingError(
            f"{type(model).__name__}: cannot be copied, and it is never changed itself: {repr(name) if name else 'it'} "
            f"has a function of its own, {function.__name__!r}, which was made around the model's "
            f"{type(held).__name__} and would compute with the original's weights in a copy. Make it a method, "
            "types.MethodType(function, module), or a module"
        )
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in kept})
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
            except Exception as refusal:  # noqa: BLE001  # looked for
                where = f"{prefix}.{name}" if prefix else name
                return f"{where!r} is a {type(value).__name__} ({what_it_said(refusal)}). {_remedy(value)}"
    return f"{what_it_said(error)}. Remove what it keeps of earlier runs, or parametrizations"


def _held(module: "nn.Module") -> dict[str, Any]:
    """What a module holds itself, by name, but for its children."""
    attributes = {
        name: value for name, value in vars(module).items() if name not in ("_modules", "_parameters", "_buffers")
    }
    return {**attributes, **module._parameters, **module._buffers}


def _remedy(value: Any) -> str:
    """A tensor that was computed has the graph of that run, which is not copied."""
    if getattr(value, "grad_fn", None) is not None:
        return (
            "It was computed in an earlier run: run the model once under torch.no_grad() (weight_norm and "
            "spectral_norm of torch.nn.utils keep their weight so), or detach it"
        )
    return "Set it to None while the model is copied, or make it where it is needed"


def _bound_to_the_original(model: "nn.Module") -> Iterator[tuple[str, FunctionType, "nn.Module"]]:
    """Module, function on it, and the module of the model that the function has hold of and computes with."""
    modules = {id(module): module for module in model.modules()}
    for name, module in model.named_modules():
        attributes = () if _is_compiled(module) else vars(module).values()
        for value in (*attributes, *module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            for function in _functions(value, set()):
                for held in _surrounding(function):
                    is_method = isinstance(held, MethodType)
                    target = modules.get(id(held.__self__ if is_method else held))
                    if target is not None and (is_method or _computes_with(function, target)):
                        yield name, function, target


def _is_compiled(module: "nn.Module") -> bool:
    """A copy of a compiled module compiles the copied one anew."""
    return type(module).__module__.startswith("torch._dynamo")


def _functions(value: Any, seen: set[int]) -> Iterator[FunctionType]:
    """The functions that a value is or runs: in a method or a partial, which are copied, and around each other."""
    while isinstance(value, MethodType | partial):
        value = value.__func__ if isinstance(value, MethodType) else value.func
    if isfunction(value) and id(value) not in seen:
        seen.add(id(value))
        yield value
        for held in _opened(_enclosed(value)):
            yield from _functions(held, seen) if isinstance(held, FunctionType | partial) else ()


def _surrounding(function: FunctionType) -> Iterator[Any]:
    """What a function holds of the place where it was made, itself or in a container."""
    named = (function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__)
    yield from _opened((*_enclosed(function), *named))


def _enclosed(function: FunctionType) -> Iterator[Any]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not set yet
            continue


def _opened(values: Iterable[Any]) -> Iterator[Any]:
    """The values, and what containers and partials among them hold."""
    for value in values:
        yield value
        if isinstance(value, partial):
            yield from (*value.args, *value.keywords.values())
        elif isinstance(value, list | tuple | set | dict):
            yield from value.values() if isinstance(value, dict) else value


def _computes_with(function: FunctionType, module: "nn.Module") -> bool:
    """Whether a function could use a module's weights: it has some itself, or the function names what is in it."""
    inside = {*module._modules, *module._parameters}
    return bool(module._parameters) or not inside.isdisjoint(function.__code__.co_names)
