"""A short name for a model's weights: equal for equal weights, whatever file or class they came from."""

import dis
import functools
import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from types import CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), PurePath)


def layer_digest(name: str, shape: Sequence[int], low: NDArray[np.float64], high: NDArray[np.float64]) -> str:
    """sha256 over a layer's name, shape, and the least and greatest weight of every output channel, (channels,).

    Extremes are exact whatever adds the sums up and in whatever order, they come with the measurement for
    nothing, and hardly any change of a channel leaves both as they were. A transposed convolution read from a
    bare file, which does not know its channels, has another digest than the module's.
    """
    digest = hashlib.sha256(f"{name}{tuple(shape)}".encode())
    digest.update(np.asarray(low, np.float32).tobytes() + np.asarray(high, np.float32).tobytes())
    return digest.hexdigest()


def fingerprint(digests: Iterable[str]) -> str:
    """One name for the digests of all layers, in any order."""
    return f"sha256:{hashlib.sha256(''.join(sorted(digests)).encode()).hexdigest()}"


def model_digest(model: "nn.Module") -> str:
    """Of every parameter and buffer of a module, to the byte."""
    return tensors_digest(model.state_dict())


def tensors_digest(tensors: Mapping[str, object]) -> str:
    """Of named tensors, to the byte."""
    import torch

    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(f"{name} {getattr(value, 'dtype', '')} {getattr(value, 'shape', '')}".encode())
        if isinstance(value, torch.Tensor):
            digest.update(tensor_bytes(value).data)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            digest.update(np.ascontiguousarray(value).tobytes())
        else:  # a module's own extra state
            digest.update(repr(value).encode())
    return f"sha256:{digest.hexdigest()}"


def tensor_bytes(tensor: "torch.Tensor") -> NDArray[np.uint8]:
    """Its values as they lie in memory, first axis first; a view where that can be."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.stride() != (1,):  # torch calls a single value of a wide tensor contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    raw: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return raw


def batches_digest(batches: Sequence[Any]) -> str:
    """Of calibration batches, whatever they are nested in."""
    from torch.utils._pytree import tree_leaves

    leaves = {f"{n}.{k}": leaf for n, batch in enumerate(batches) for k, leaf in enumerate(tree_leaves(batch))}
    return tensors_digest(leaves)


def source_digest(function: object) -> str:
    """Of a function's own source text, or its name where that cannot be had, and of what is bound to it.

    That is what `functools.partial` holds and what a function inside another has from there: tensors, plain values and
    functions, but for what it assigns itself. Of a list, a dict or a set, and of a callable object, which calls may
    change, it is the tensors in them, and of other objects the class alone.
    """
    return f"sha256:{_of_code(function, frozenset())}"


def _of_code(function: object, seen: frozenset[int]) -> str:
    """seen: what is being looked at, for a function may hold itself."""
    code = inspect.unwrap(function) if callable(function) else function
    try:
        text = inspect.getsource(code if hasattr(code, "__qualname__") else type(code))  # type: ignore[arg-type]
    except (OSError, TypeError):
        text = repr(getattr(code, "__qualname__", function))
    bound = "" if id(function) in seen else _of_bound(_bound(function), seen | {id(function)})
    return hashlib.sha256(f"{text}{bound}".encode()).hexdigest()


def _bound(function: object) -> list[Any]:
    """What goes into a call beside its arguments."""
    if isinstance(function, functools.partial):
        return [function.func, *function.args, *sorted(function.keywords.items())]
    if isinstance(function, type):
        return []
    if isinstance(function, FunctionType):
        own = {step.argval for step in dis.get_instructions(function) if step.opname == "STORE_DEREF"}  # its own state
        named = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        cells = [cell.cell_contents for name, cell in named if cell != CellType() and name not in own]
        return [*cells, *(function.__defaults__ or ()), *((function.__kwdefaults__ or {}).values())]
    if isinstance(function, MethodType):
        return [function.__func__, *_bound(function.__self__)]
    return [] if hasattr(function, "__qualname__") else _tensors_of(function)


def _tensors_of(held: object) -> list[Any]:
    """The tensors among an object's attributes; others may count its calls."""
    import torch

    own = getattr(held, "__dict__", {})
    return [value for value in own.values() if isinstance(value, torch.Tensor | np.ndarray)]


def _of_bound(values: list[Any], seen: frozenset[int]) -> str:
    """Nothing for nothing, so that a plain function has the digest of its text."""
    parts = [part for value in values for part in _lasting(value)]
    return tensors_digest({f"{n}": _plain(part, seen) for n, part in enumerate(parts)}) if parts else ""


def _lasting(value: object) -> list[Any]:
    """What of a bound value counts: of a list, a dict or a set, which calls may add to, the tensors alone."""
    import torch
    from torch.utils._pytree import tree_leaves

    if isinstance(value, tuple):
        return [part for item in value for part in _lasting(item)]
    if isinstance(value, list | dict | set):
        leaves = tree_leaves(list(value) if isinstance(value, set) else value)
        return [type(value), *(leaf for leaf in leaves if isinstance(leaf, torch.Tensor | np.ndarray))]
    return [value]


def _plain(leaf: Any, seen: frozenset[int]) -> object:
    """What says the same of equal values in another process: tensors and plain values themselves, else a text."""
    import torch

    if isinstance(leaf, (torch.Tensor, np.ndarray, *PLAIN)):
        return leaf
    if isinstance(leaf, FunctionType | MethodType | functools.partial):
        return _of_code(leaf, seen)
    return f"{type(leaf).__module__}.{type(leaf).__qualname__}"
