"""Tensors in files: safetensors, sharded safetensors, torch checkpoints. No pickle is ever executed."""

import pickle
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.files import exists, open_regular
from ..common.text import first_few, first_sentence
from ..errors import SourceError
from ..models.wrappers import bare_names
from .file_kinds import damage, of_quantizers, other_kind, pickled_objects
from .gguf_files import gguf_tensors
from .gguf_header import is_gguf
from .readers import MemoryRows, StoredTensor, safetensors_tensors
from .shards import INDEX_NAME, SINGLE_NAME, directory_tensors, weight_files
from .state_dicts import TOP, StateDict, beside, chosen_state_dict
from .torch_files import archive_places, expanded, expands, in_file, lie_there, refuse_overlaps

CONTAINER_MAGIC = b"\x89MPQ\r\n\x1a\n"
"""How a compressed model begins (compression/container.py). As PNG's: a transfer that changes line ends, or drops the
eighth bit, changes it."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, by the names that its model has.

    tensors: by name; key: where in a torch checkpoint the weights were found, dots between keys, or None for the top;
    beside: what a torch checkpoint holds beside them; content, chosen: of a torch checkpoint that was read whole, all
    of it, and the mapping in it that holds the weights.
    """

    tensors: Mapping[str, StoredTensor]
    key: str | None = None
    beside: tuple[str, ...] = ()
    content: Any = None
    chosen: StateDict | None = None


def open_checkpoint(path: Path, weights: str | None = None) -> Mapping[str, StoredTensor]:
    """The tensors of a checkpoint by name, without what wraps a model. Raises SourceError as read_checkpoint."""
    return read_checkpoint(path, weights).tensors


def read_checkpoint(
    path: Path, weights: str | None = None, *, prefer: str | None = None, whole: bool = False
) -> Checkpoint:
    """A checkpoint's tensors, which stay where they are until they are read.

    weights: the key of the set that is meant, in a torch checkpoint with several (see chosen_state_dict); prefer: the
    key to take, if it is there, where nothing is meant; whole: read all of a torch checkpoint that is one file, for
    whoever writes it anew. Raises SourceError.
    """
    if not exists(path):
        raise SourceError(
            f"{path}: no such file. Give a .safetensors file, a directory with {INDEX_NAME} or {SINGLE_NAME}, "
            "a torch checkpoint or a GGUF file."
        )
    if path.is_dir():
        return _from_directory(path, weights)
    if is_container(path):
        raise SourceError(f"{path}: is a compressed model, not a checkpoint; `mpq decompress` makes one of it")
    if is_gguf(path):
        _check_one_set(path, weights, "GGUF files")
        return Checkpoint(gguf_tensors(path))
    refuse_other_kinds(path)
    if path.suffix == ".safetensors":
        _check_one_set(path, weights)
        return Checkpoint(_bare(safetensors_tensors(path)))
    content = load_torch(path) if whole else load_lazily(path)
    chosen = chosen_state_dict(content, path, weights, prefer=prefer)
    key = None if chosen.key == TOP else chosen.key
    others = beside(content, chosen)
    kept = (content, chosen) if whole else ()
    return Checkpoint(_bare(stored_tensors(chosen.state, path)), key, others, *kept)


def refuse_other_kinds(path: Path) -> None:
    """Raise SourceError, saying what it is, for a file that begins as no checkpoint does."""
    what = other_kind(path)
    if what is not None:
        raise SourceError(f"{path}: is {what}")


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
        objects = pickled_objects(path, str(error))
        if not objects and "WeightsUnpickler" not in str(error) and "GLOBAL" not in str(error):
            raise SourceError(f"{path}: not a readable torch checkpoint ({first_sentence(error)})") from error
        quantized = of_quantizers(objects)
        if quantized:
            raise SourceError(
                f"{path}: quantized already: it holds {first_few(quantized, ', ')}. Give the checkpoint in floating "
                "point that it was made of"
            ) from error
        named = first_few(objects, ", ") or "which torch does not name"
        raise SourceError(
            f"{path}: refused, for reading it would execute code or build objects other than tensors ({named}). "
            "Save model.state_dict() by itself, or convert the file to safetensors."
        ) from error
    except Exception as error:  # damaged bytes make torch raise whatever they lead it to
        reason = damage(path) or first_sentence(error)
        raise SourceError(f"{path}: not a readable torch checkpoint ({reason})") from error


def stored_tensors(state: Mapping[str, Any], path: Path | None = None) -> dict[str, StoredTensor]:
    """The tensors of a state dict by name; what is no tensor, or has no name, is left out.

    path: the file that they were loaded from lazily. Raises SourceError, naming it, for a tensor without values, a
    sparse one, and a name that is no text.
    """
    plain = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    where = "" if path is None else f"{path}: "
    for name, value in plain.items():
        kept = type(value.data)
        if kept.__torch_dispatch__ is not Tensor.__torch_dispatch__:  # whoever imported its library can load it
            raise SourceError(
                f"{where}tensor {name!r} is quantized already, or kept in another form ({kept.__name__}). Give the "
                "checkpoint in floating point that it was made of"
            )
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


def _from_directory(directory: Path, weights: str | None) -> Checkpoint:
    files = weight_files(directory)
    if all(path.suffix == ".safetensors" for path in files.paths):
        _check_one_set(directory, weights)
    tensors = directory_tensors(files, lambda path: _file_tensors(path, weights))
    return Checkpoint(_bare(tensors))


def _file_tensors(path: Path, weights: str | None) -> Mapping[str, StoredTensor]:
    """Of one file of a directory, by the names it has there."""
    refuse_other_kinds(path)
    if path.suffix == ".safetensors":
        return safetensors_tensors(path)
    return stored_tensors(chosen_state_dict(load_lazily(path), path, weights).state, path)


def _check_one_set(path: Path, weights: str | None, what: str = "safetensors") -> None:
    if weights is not None:
        raise SourceError(f"{path}: weights: {weights!r} is a torch checkpoint's key; {what} hold one set")


def _bare(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    names = bare_names({name: tensor.shape for name, tensor in stored.items()})
    return {names[name]: tensor for name, tensor in stored.items()}
