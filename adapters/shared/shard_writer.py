"""Tensors written as safetensors shards of bounded size, with the index that says which is where."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mpq_plugins.checkpoints.shards import INDEX_NAME, SINGLE_NAME
from mpq_plugins.common.text import first_sentence
from mpq_plugins.errors import SourceError

BUFFERED = 512 << 20  # bytes


class ShardWriter:
    """Keeps tensors until there are `limit` bytes of them, BUFFERED by default, then writes a shard.

    metadata: the format that shards say they are of.
    """

    def __init__(self, directory: Path, metadata: str = "pt", limit: int | None = None) -> None:
        self.directory, self.metadata, self.limit = directory, metadata, BUFFERED if limit is None else limit
        self.total = 0
        self._waiting: dict[str, Tensor] = {}
        self._bytes = 0
        self._shards: list[list[str]] = []

    def put(self, name: str, tensor: Tensor) -> int:
        """Take a tensor; returns its bytes. Raises OSError where a shard cannot be written."""
        tensor = tensor.detach().contiguous()
        if self._waiting and self._bytes + tensor.nbytes > self.limit:
            self._flush()
        self._waiting[name] = tensor
        self._bytes += tensor.nbytes
        self.total += tensor.nbytes
        return tensor.nbytes

    def finish(self) -> None:
        """Write what waits, and the index where there is more than one file."""
        self._flush()
        if len(self._shards) == 1:
            self._part(0).rename(self.directory / SINGLE_NAME)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._part(number).rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        path = self._part(len(self._shards))
        try:
            save_file(self._waiting, path, {"format": self.metadata})
        except SafetensorError as error:
            raise SourceError(f"{path.parent}: cannot be written ({first_sentence(error)})") from error
        self._shards.append(list(self._waiting))
        self._waiting, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.directory / f"part-{number}.safetensors"
