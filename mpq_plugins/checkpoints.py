"""Tensors in files: safetensors, sharded safetensors, torch checkpoints. No pickle is ever executed."""

import json
import math
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .buffers import chunk_buffer
from .errors import SourceError
from .files import exists

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Where training scripts put the weights, most specific first.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "weights", "params")

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: read_rows(start, stop) gives rows of the first axis, (stop - start, rest).

    identity is equal for two names of the same storage.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: Callable[[int, int], Tensor]
    identity: object


def open_checkpoint(path: Path) -> Mapping[str, StoredTensor]:
    """The tensors of a checkpoint by name, `module.` prefixes stripped. Raises SourceError."""
    if not exists(path):
        raise SourceError(
            f"{path}: no such file. Give a .safetensors file, a directory with {INDEX_NAME} or {SINGLE_NAME}, "
            "or a torch checkpoint."
        )
    if path.is_dir():
        return _strip(_directory(path))
    if path.suffix == ".safetensors":
        return _strip(_safetensors(path))
    return _strip(_torch_tensors(find_state_dict(load_torch(path), path)))


def load_torch(path: Path) -> Any:
    """The content of a torch checkpoint, read with weights_only=True. Raises SourceError."""
    try:
        try:  # the current format can stay on disk until a tensor is read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = _first_sentence(error)
        if "WeightsUnpickler" not in str(error) and "GLOBAL" not in str(error) and "weights_only" not in reason:
            raise SourceError(f"{path}: not a readable torch checkpoint ({reason})") from error
        raise SourceError(
            f"{path}: refused, for reading it would execute code or build objects other than tensors ({reason}). "
            "Save model.state_dict() instead, or convert the file to safetensors."
        ) from error
    except Exception as error:  # damaged bytes make torch raise whatever they lead it to
        raise SourceError(f"{path}: not a readable torch checkpoint ({_first_sentence(error)})") from error


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
    while names and all(name.startswith(f"{prefix}module.") for name in names):
        prefix += "module."
    return prefix


def shard_files(directory: Path) -> dict[str, list[str]]:
    """Shard file -> tensor names, from the directory's index. Raises SourceError on a path that leaves it."""
    index = directory / INDEX_NAME
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        items = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{index}: not a safetensors index ({error!r}); it needs a 'weight_map' object") from error
    shards: dict[str, list[str]] = {}
    for name, shard in items:
        parts = PurePosixPath(shard)
        # Judged by its words: hubs' caches link shards elsewhere on purpose, but never name a path outside.
        if parts.is_absolute() or ".." in parts.parts or "\\" in shard:
            raise SourceError(f"{index}: tensor {name!r} is mapped to {shard!r}, outside its directory; refused")
        if not (directory / shard).is_file():
            raise SourceError(f"{index}: tensor {name!r} is mapped to {shard!r}, and there is no such file")
        shards.setdefault(shard, []).append(name)
    return shards


def _directory(directory: Path) -> dict[str, StoredTensor]:
    if (directory / INDEX_NAME).is_file():
        found: dict[str, StoredTensor] = {}
        for shard, names in shard_files(directory).items():
            stored = _safetensors(directory / shard)
            for name in names:
                if name not in stored:
                    raise SourceError(f"{directory / shard}: lacks tensor {name!r}, which {INDEX_NAME} puts there")
                found[name] = stored[name]
        return found
    if (directory / SINGLE_NAME).is_file():
        return _safetensors(directory / SINGLE_NAME)
    raise SourceError(f"{directory}: no weights there; a directory needs {INDEX_NAME} or {SINGLE_NAME}")


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt") as checked:  # the library validates names, types, offsets and length
            names = list(checked.offset_keys())
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path}: truncated or not a safetensors file ({_first_sentence(error)})") from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: _stored(path, name, header[name], 8 + length) for name in names}


def _stored(path: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise SourceError(f"{path}: tensor {name!r} has dtype {entry['dtype']}, which is not supported")
    shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
    row_elements = math.prod(shape[1:])
    start = data_start + entry["data_offsets"][0]

    def read_rows(first: int, last: int) -> Tensor:
        # Plain reads, not the library's memory map: mapped pages would count as this process's memory.
        row_bytes = row_elements * dtype.itemsize
        buffer = chunk_buffer((last - first) * row_bytes)
        with path.open("rb") as file:
            file.seek(start + first * row_bytes)
            if file.readinto(buffer) != len(buffer):
                raise SourceError(f"{path}: tensor {name!r} is cut short; the file changed while being read")
        if not len(buffer):
            return torch.empty((last - first, row_elements), dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).view(last - first, row_elements)

    return StoredTensor(shape, dtype, read_rows, (path, name))


def _torch_tensors(state: Mapping[str, Any]) -> dict[str, StoredTensor]:
    plain = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for name, value in plain.items():
        if value.layout != torch.strided or value.is_nested:
            raise SourceError(
                f"tensor {name!r} is {value.layout}, nested or sparse; convert it to a dense tensor first"
            )
    return {name: _in_memory(name, value) for name, value in plain.items()}


def _in_memory(name: str, tensor: Tensor) -> StoredTensor:
    def read_rows(first: int, last: int) -> Tensor:
        part = tensor[first:last].contiguous()
        return part.reshape(last - first, part.numel() // max(1, last - first))

    return StoredTensor(tuple(tensor.shape), tensor.dtype, read_rows, storage_identity(name, tensor))


def storage_identity(name: str, tensor: Tensor) -> object:
    """A key that two names share when they are the same storage, seen the same way; empty tensors are never tied."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.numel() == 0:
        return name
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def _strip(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    prefix = common_prefix(stored)
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items()}


def layer_name(parameter: str) -> str:
    """`conv1.weight` -> `conv1`."""
    return parameter.removesuffix("weight").removesuffix(".")


def _has_tensors(mapping: Mapping[Any, Any]) -> bool:
    return any(isinstance(key, str) and isinstance(value, Tensor) for key, value in mapping.items())


def _holds_tensors(mapping: Mapping[Any, Any]) -> bool:
    """At its top, or under one of the usual keys."""
    inner = (mapping.get(key) for key in STATE_KEYS)
    return _has_tensors(mapping) or any(isinstance(value, Mapping) and _has_tensors(value) for value in inner)


def _first_sentence(error: Exception) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch colours some of its messages
    lines: Iterator[str] = (line.strip() for line in plain.splitlines())
    text = next((line for line in lines if line), type(error).__name__)
    return text if len(text) <= 160 else f"{text[:157]}..."
