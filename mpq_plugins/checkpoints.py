"""Tensors in files: safetensors, sharded safetensors, torch checkpoints. No pickle is ever executed."""

import pickle
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import SourceError, first_sentence
from .files import exists, open_regular
from .shards import INDEX_NAME, SINGLE_NAME, directory_tensors
from .tensor_files import MemoryRows, StoredTensor, safetensors_tensors
from .torch_files import archive_places, expanded, expands, in_file, lie_there, refuse_overlaps

CONTAINER_MAGIC = b"\x89MPQ\r\n\x1a\n"
"""How a compressed model begins (compress/container.py). As PNG's: a transfer that changes line ends, or drops the
eighth bit, changes it."""

# Where training scripts put the weights, most specific first.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "weights", "params")


def open_checkpoint(path: Path) -> Mapping[str, StoredTensor]:
    """The tensors of a checkpoint by name, `module.` prefixes stripped. Raises SourceError."""
    if not exists(path):
        raise SourceError(
            f"{path}: no such file. Give a .safetensors file, a directory with {INDEX_NAME} or {SINGLE_NAME}, "
            "or a torch checkpoint."
        )
    if path.is_dir():
        return _strip(directory_tensors(path))
    if is_container(path):
        raise SourceError(f"{path}: is a compressed model, not a checkpoint; `mpq decompress` makes one of it")
    if path.suffix == ".safetensors":
        return _strip(safetensors_tensors(path))
    return _strip(stored_tensors(find_state_dict(load_lazily(path), path), path))


def is_container(path: Path) -> bool:
    """Whether a file begins as compressed models do."""
    try:
        with open_regular(path) as file:
            return file.read(len(CONTAINER_MAGIC)) == CONTAINER_MAGIC
    except OSError:
        return False


def load_lazily(path: Path) -> Any:
    """The content of a torch checkpoint with tensors that have no values yet, for `stored_tensors`; with values where a
    format cannot do that. Raises SourceError."""
    places = _places(path)
    if places is not None:
        with suppress(SourceError):  # some kinds of tensors need a device
            content = _loaded(path, "meta")
            if lie_there(content, places):
                return content
    return load_torch(path)


def load_torch(path: Path) -> Any:
    """The content of a torch checkpoint, all of it in memory, read with weights_only=True. Raises SourceError."""
    _places(path)
    return _loaded(path, "cpu")


def _places(path: Path) -> dict[int, int] | None:
    try:
        return archive_places(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SourceError(f"{path}: not a readable torch checkpoint ({reason})") from error


def _loaded(path: Path, device: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch is about to raise an error for
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = first_sentence(error)
        if "WeightsUnpickler" not in str(error) and "GLOBAL" not in str(error) and "weights_only" not in reason:
            raise SourceError(f"{path}: not a readable torch checkpoint ({reason})") from error
        raise SourceError(
            f"{path}: refused, for reading it would execute code or build objects other than tensors ({reason}). "
            "Save model.state_dict() instead, or convert the file to safetensors."
        ) from error
    except Exception as error:  # damaged bytes make torch raise whatever they lead it to
        raise SourceError(f"{path}: not a readable torch checkpoint ({first_sentence(error)})") from error


def find_state_dict(content: Any, path: Path) -> MutableMapping[str, Any]:
    """The mapping that holds a checkpoint's tensors by name: at its top, or nested. Raises SourceError.

    Nested, it is looked for under the usual keys, or is the only candidate. The mapping is the checkpoint's
    own, so that replacing a tensor in it replaces the checkpoint's.
    """
    if not isinstance(content, MutableMapping):
        raise SourceError(f"{path}: holds a {type(content).__name__}, not a state dict")
    nested = {key: value for key, value in content.items() if isinstance(value, MutableMapping)}
    # A checkpoint may keep its best accuracy as a tensor beside its weights, so the usual keys come first.
    for key in STATE_KEYS:
        if key in nested and _holds_tensors(nested[key]):
            return nested[key] if _has_tensors(nested[key]) else find_state_dict(nested[key], path)
    if _has_tensors(content):
        return content
    candidates = [key for key, value in nested.items() if _has_tensors(value)]
    if len(candidates) != 1:
        which = f"several state dicts ({', '.join(map(str, candidates))})" if candidates else "no tensors"
        raise SourceError(f"{path}: holds {which}; the weights are expected at the top or under {STATE_KEYS[0]!r}")
    chosen: MutableMapping[str, Any] = nested[candidates[0]]
    return chosen


def common_prefix(names: Iterable[str]) -> str:
    """`module.`, as often as DataParallel put it before every name, or nothing."""
    prefix, names = "", tuple(names)
    while names and all(str(name).startswith(f"{prefix}module.") for name in names):
        prefix += "module."
    return prefix


def stored_tensors(state: Mapping[str, Any], path: Path | None = None) -> dict[str, StoredTensor]:
    """The tensors of a state dict by name; what is no tensor, or has no name, is left out.

    path: the file that they were loaded from lazily. Raises SourceError, naming it, for a tensor without values, a
    sparse one, and a name that is no text.
    """
    plain = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    where = "" if path is None else f"{path}: "
    for name, value in plain.items():
        if value.layout != torch.strided or value.is_nested:
            raise SourceError(
                f"{where}tensor {name!r} is {value.layout}, nested or sparse; convert it to a dense tensor first"
            )
        if not _is_text(name):
            raise SourceError(f"{where}tensor {name!r} has a name that is no text; rename it")
    if path is not None:
        refuse_overlaps(path, plain)
    places = (_places(path) or {}) if path is not None else {}
    return {name: _stored(name, value, path, places) for name, value in plain.items()}


def _stored(name: str, value: Tensor, path: Path | None, places: Mapping[int, int]) -> StoredTensor:
    if value.is_meta and path is not None:
        return in_file(path, name, value, places)
    if value.is_meta:
        raise SourceError(f"tensor {name!r} is on the meta device and has no values; materialise it first")
    if path is not None and expands(value):
        return StoredTensor(tuple(value.shape), value.dtype, expanded(path, name, value), name)
    return StoredTensor(tuple(value.shape), value.dtype, MemoryRows(value), storage_identity(name, value))


def _is_text(name: str) -> bool:
    """Whether files can hold the name: half a surrogate pair they cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def storage_identity(name: str, tensor: Tensor) -> object:
    """A key that two names share when they are the same storage, seen the same way; empty tensors are never tied."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.numel() == 0:
        return name
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _strip(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    prefix = common_prefix(stored)
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items()}


def layer_name(parameter: str) -> str:
    """`conv1.weight` -> `conv1`."""
    return "" if parameter == "weight" else parameter.removesuffix(".weight")


def _has_tensors(mapping: Mapping[Any, Any]) -> bool:
    return any(isinstance(key, str) and isinstance(value, Tensor) for key, value in mapping.items())


def _holds_tensors(mapping: Mapping[Any, Any]) -> bool:
    """At its top, or under one of the usual keys."""
    inner = (mapping.get(key) for key in STATE_KEYS)
    return _has_tensors(mapping) or any(isinstance(value, Mapping) and _has_tensors(value) for value in inner)
