"""Finished blocks in a store, so that an interrupted reconstruction goes on at the block it was in."""

import glob
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from .settings import BlockReport, Compensation, LayerReport, Settings


def job_of(
    model: nn.Module, plan: Plan, batches: Sequence[Any], settings: Settings | Compensation, device: torch.device
) -> Mapping[str, str]:
    """What decides the result of a reconstruction or compensation."""
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
        stored = _unpacked(self._finished, _unit(position, name))
        if stored is None or stored[1] is None:
            return None
        with suppress(KeyError, TypeError):
            report = {**stored[1], "layers": tuple(stored[1]["layers"])}
            return stored[0], replace(BlockReport(**report), resumed=True)
        return None

    def write(self, position: int, tensors: Mapping[str, Tensor], report: BlockReport) -> None:
        """Keep a finished block."""
        self._finished.add(_unit(position, report.name), _packed(tensors, asdict(report)))


class FinishedLayers:
    """The finished stations of a compensation in a store: tensors of each, and what was reported of a layer."""

    def __init__(self, finished: Finished) -> None:
        self._finished = finished

    def read(self, unit: str) -> tuple[dict[str, Tensor], LayerReport | None] | None:
        """Tensors by their names in the module, and the report; None if the station was not finished."""
        stored = _unpacked(self._finished, unit)
        if stored is None:
            return None
        with suppress(TypeError):
            return stored[0], None if stored[1] is None else replace(LayerReport(**stored[1]), resumed=True)
        return None

    def write(self, unit: str, tensors: Mapping[str, Tensor], report: LayerReport | None) -> None:
        """Keep what is finished."""
        self._finished.add(unit, _packed(tensors, None if report is None else asdict(report)))


def _packed(tensors: Mapping[str, Tensor], report: dict[str, Any] | None) -> bytes:
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(plain, {"report": json.dumps(report)})


def _unpacked(finished: Finished, unit: str) -> tuple[dict[str, Tensor], dict[str, Any] | None] | None:
    """Tensors and report as they were kept; None where there are none, or none that can be read."""
    if unit not in finished:
        return None
    data = finished.take(unit)
    try:
        report = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["report"])
        return load(data), report
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None


def _unit(position: int, name: str) -> str:
    return f"{position:05d} {name}"
