"""A directory of weights: one file, or several and the index that says which tensor is where, which must agree."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..common.checks import as_integer, shown
from ..common.documents import load_json
from ..common.files import exists
from ..common.text import first_few
from ..errors import SourceError
from .file_kinds import other_kind
from .readers import StoredTensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"
TORCH_SINGLE_NAME = "pytorch_model.bin"
USUAL = (INDEX_NAME, SINGLE_NAME, TORCH_INDEX_NAME, TORCH_SINGLE_NAME)
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
INDEX_SUFFIX = ".index.json"
PART = re.compile(r"(.+)-\d+-of-(\d+)(\.\w+)")  # such as model-00001-of-00003.safetensors


@dataclass(frozen=True)
class WeightFiles:
    """Which files of a directory hold its weights: shard -> the tensors that the index puts there.

    index: the index's file, or None where one file holds all.
    """

    directory: Path
    index: Path | None
    shards: Mapping[str, list[str]]

    @property
    def chosen(self) -> Path:
        """What was found in the directory first."""
        return self.index or self.paths[0]

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.directory / shard for shard in self.shards]


def weight_files(directory: Path) -> WeightFiles:
    """The weights of a directory: under the usual names, or the only ones there under another.

    safetensors come before torch checkpoints, and an index before a single file. Raises SourceError where there are
    none, or several and nothing says which; and as `shard_files`.
    """
    chosen = next((directory / name for name in USUAL if (directory / name).is_file()), None) or _only(directory)
    if chosen.name.endswith(INDEX_SUFFIX):
        return WeightFiles(directory, chosen, shard_files(directory, chosen.name))
    return WeightFiles(directory, None, {chosen.name: []})


def _only(directory: Path) -> Path:
    """The one index or weight file under a name of its own."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    for kind in (
        [path for path in files if path.name.endswith(f".safetensors{INDEX_SUFFIX}")],
        [path for path in files if path.suffix == ".safetensors"],
        [path for path in files if path.name.endswith(f".bin{INDEX_SUFFIX}")],
        [path for path in files if path.suffix in TORCH_SUFFIXES and path.name not in _NO_WEIGHTS],
    ):
        _refuse_parts(directory, kind)
        if len(kind) == 1:
            return kind[0]
        if kind:
            named = first_few([path.name for path in kind], ", ")
            raise SourceError(f"{directory}: holds {len(kind)} files that may be meant: {named}. Give one of them")
    others = [f"{path.name} is {what}" for path in files if (what := _strange(path)) is not None]
    others += [f"There are some in {path.name}: give that" for path in _inner(directory)]
    there = f". {others[0]}" if others else ""
    raise SourceError(f"{directory}: no weights there; a directory needs {', '.join(USUAL[:-1])} or {USUAL[-1]}{there}")


def _refuse_parts(directory: Path, files: Sequence[Path]) -> None:
    """Raise SourceError for parts of a checkpoint without the index that names them: some of them are no model."""
    for path in files:
        part = PART.fullmatch(path.name)
        if part is not None and as_integer(part[2]) != 1:
            raise SourceError(
                f"{directory}: {path.name} is one of several parts, and the index that says where each tensor is is "
                f"not there: fetch {part[1]}{part[3]}{INDEX_SUFFIX}"
            )


def _strange(path: Path) -> str | None:
    """What a file is that could be a checkpoint; hidden files are tools' own, and texts describe one."""
    return None if path.name.startswith(".") or path.suffix in _DESCRIBE else other_kind(path)


def _inner(directory: Path) -> list[Path]:
    """Directories in it that hold weights."""
    folders = (path.parent for path in sorted(directory.glob("*/*")) if path.name in USUAL or path.suffix in _SUFFIXES)
    return list(dict.fromkeys(folders))


_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
_DESCRIBE = ("", ".json", ".txt", ".md", ".py", ".yaml", ".yml")
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin", "scheduler.bin", "scaler.pt")


def shard_files(directory: Path, index_name: str = INDEX_NAME) -> dict[str, list[str]]:
    """Shard file -> tensor names, from the directory's index.

    Raises SourceError on an index that is none, a path that leaves the directory, and a shard that is not there.
    """
    index = directory / index_name
    try:
        weight_map = load_json(index)["weight_map"]
        items = list(weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        kind = "safetensors" if ".safetensors" in index_name else "checkpoint's"
        raise SourceError(f"{index}: not a {kind} index ({error!r:.200}); it needs a 'weight_map' object") from error
    shards: dict[str, list[str]] = {}
    for name, shard in items:
        if not isinstance(shard, str):
            raise SourceError(f"{index}: tensor {name!r} is mapped to {shown(shard)}, which is no file's name")
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


def directory_tensors(
    files: WeightFiles, opened: Callable[[Path], Mapping[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """The tensors of a directory by name, in the index's order; `opened` gives a file's.

    Raises SourceError where index and shards disagree.
    """
    held = {shard: opened(files.directory / shard) for shard in files.shards}
    if files.index is None:
        (only,) = held.values()
        return dict(only)
    _check_agreement(files, held)
    return {name: held[shard][name] for shard, names in files.shards.items() for name in names}


def _check_agreement(files: WeightFiles, held: Mapping[str, Mapping[str, StoredTensor]]) -> None:
    """Every tensor in one shard, the one that the index names, and no tensor beside."""
    directory, shards = files.directory, files.shards
    index_name = files.index.name if files.index is not None else ""
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
                    f"{directory / shard}: lacks tensor {name!r}, which {index_name} puts there{where}. Index and "
                    "shards are of different checkpoints: fetch them again"
                )
    indexed = {name for names in shards.values() for name in names}
    extra = [name for name in first if name not in indexed]
    if extra:
        raise SourceError(
            f"{directory / first[extra[0]]}: holds tensor {extra[0]!r}, of which {index_name} knows nothing "
            f"({len(extra)} such in all). Index and shards are of different checkpoints: fetch them again"
        )
