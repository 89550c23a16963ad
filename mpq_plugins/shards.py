"""A checkpoint in several safetensors files and the index that says which tensor is where: they must agree."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from .documents import load_json
from .errors import SourceError, first_few
from .files import exists
from .tensor_files import StoredTensor, safetensors_tensors

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def shard_files(directory: Path) -> dict[str, list[str]]:
    """Shard file -> tensor names, from the directory's index.

    Raises SourceError on an index that is none, a path that leaves the directory, and a shard that is not there.
    """
    index = directory / INDEX_NAME
    try:
        weight_map = load_json(index)["weight_map"]
        items = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{index}: not a safetensors index ({error!r:.200}); it needs a 'weight_map' object"
        ) from error
    shards: dict[str, list[str]] = {}
    for name, shard in items:
        parts = PurePosixPath(shard)
        # Judged by its words: hubs' caches link shards elsewhere on purpose, but never name a path outside.
        if parts.is_absolute() or ".." in parts.parts or "\\" in shard:
            raise SourceError(f"{index}: tensor {name!r} is mapped to {shard!r}, outside its directory; refused")
        shards.setdefault(str(parts), []).append(name)
    missing = [shard for shard in shards if not exists(directory / shard)]
    if missing:
        raise SourceError(
            f"{index}: tensor {shards[missing[0]][0]!r} is mapped to {missing[0]!r}, and there is no such file; "
            f"{len(missing)} of {len(shards)} shards are missing ({first_few(missing, ', ')}): fetch them"
        )
    return shards


def directory_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a directory by name, in the index's order. Raises SourceError where index and shards disagree."""
    if not (directory / INDEX_NAME).is_file():
        if (directory / SINGLE_NAME).is_file():
            return safetensors_tensors(directory / SINGLE_NAME)
        raise SourceError(f"{directory}: no weights there; a directory needs {INDEX_NAME} or {SINGLE_NAME}")
    shards = shard_files(directory)
    held = {shard: safetensors_tensors(directory / shard) for shard in shards}
    _check_agreement(directory, shards, held)
    return {name: held[shard][name] for shard, names in shards.items() for name in names}


def _check_agreement(
    directory: Path, shards: Mapping[str, list[str]], held: Mapping[str, Mapping[str, StoredTensor]]
) -> None:
    """Every tensor in one shard, the one that the index names, and no tensor beside."""
    first: dict[str, str] = {}
    for shard, tensors in held.items():
        for name in tensors:
            if name in first:
                raise SourceError(
                    f"{directory / shard}: holds tensor {name!r}, and so does {first[name]}; shards of different "
                    "checkpoints, or slices for several devices? Keep one of them, or merge the slices"
                )
            first[name] = shard
    for shard, names in shards.items():
        for name in names:
            if name not in held[shard]:
                where = f"; it is in {first[name]}" if name in first else ""
                raise SourceError(
                    f"{directory / shard}: lacks tensor {name!r}, which {INDEX_NAME} puts there{where}. Index and "
                    "shards are of different checkpoints: fetch them again"
                )
    indexed = {name for names in shards.values() for name in names}
    extra = [name for name in first if name not in indexed]
    if extra:
        raise SourceError(
            f"{directory / first[extra[0]]}: holds tensor {extra[0]!r}, of which {INDEX_NAME} knows nothing "
            f"({len(extra)} such in all). Index and shards are of different checkpoints: fetch them again"
        )
