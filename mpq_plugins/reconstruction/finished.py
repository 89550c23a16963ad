"""Finished blocks in a store, so that an interrupted reconstruction goes on at the block it was in."""

import glob
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..common.store import Finished
from ..models.fingerprint import batches_digest, model_digest, source_digest, tensors_digest
from ..plans.plan import Plan
from .cache import CACHE
from .settings import BlockReport, Settings


def job_of(
    model: nn.Module, plan: Plan, batches: Sequence[Any], settings: Settings, device: torch.device
) -> Mapping[str, str]:
    """What decides the result of a reconstruction."""
    classes = {type(module).__qualname__: source_digest(type(module)) for module in model.modules()}
    return {
        "model": model_digest(model), "architecture": repr(model), "code": repr(sorted(classes.items())),
        "buffers": tensors_digest(dict(model.named_buffers())), "plan": plan.to_json(),
        "batches": batches_digest(batches), "settings": repr(settings), "device": device.type,
        "torch": torch.__version__,
    }  # fmt: skip


class FinishedBlocks:
    """The finished blocks in a store: the tensors of each, and what was reported of it."""

    def __init__(self, finished: Finished) -> None:
        self._finished = finished
        path = finished.store.path.absolute()
        self.folder, self.cache_name = path.parent, f"{path.name}-{CACHE}"
        for left in self.folder.glob(f"{glob.escape(self.cache_name)}*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)

    def read(self, position: int, name: str) -> tuple[dict[str, Tensor], BlockReport] | None:
        """The block's tensors and what was reported; None if it was not finished."""
        unit = _unit(position, name)
        if unit not in self._finished:
            return None
        data = self._finished.take(unit)
        try:
            report = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["report"])
            stored = BlockReport(**{**report, "layers": tuple(report["layers"])})
            return load(data), replace(stored, resumed=True)
        except (SafetensorError, KeyError, TypeError, ValueError):
            return None

    def write(self, position: int, tensors: Mapping[str, Tensor], report: BlockReport) -> None:
        """Keep a finished block."""
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._finished.add(_unit(position, report.name), save(plain, {"report": json.dumps(asdict(report))}))


def _unit(position: int, name: str) -> str:
    return f"{position:05d} {name}"
