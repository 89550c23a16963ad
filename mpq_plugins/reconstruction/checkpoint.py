"""Finished blocks on disk, so that an interrupted reconstruction goes on at the block it was in."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..common.documents import load_json
from ..common.files import atomic_path, exists, write_text
from ..errors import SettingError, SourceError
from ..models.fingerprint import batches_digest, model_digest, source_digest, tensors_digest
from ..plans.plan import Plan
from .cache import CACHE
from .settings import BlockReport, Settings

JOB = "job.json"


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


class Checkpoint:
    """A folder with one safetensors file for each finished block, and whose job they are.

    Raises SettingError for a folder that holds another job's, or something else; SourceError where it cannot write.
    """

    def __init__(self, folder: Path, job: Mapping[str, str]) -> None:
        self.folder, self._job = folder, dict(job)
        if exists(folder) and not folder.is_dir():
            raise SettingError(f"checkpoint: {folder} is no folder; name another")
        try:
            names = {path.name for path in folder.iterdir()} if exists(folder) else set()
        except OSError as error:
            raise SettingError(f"checkpoint: {folder} cannot be read ({error.strerror}); name another") from error
        finished = any(name.endswith(".safetensors") for name in names)
        stored = _stored(folder / JOB) if JOB in names else None
        if stored is not None or (finished and JOB in names):
            if finished and stored != dict(job):
                raise SettingError(
                    f"checkpoint: {folder} holds blocks of another job (another model, plan, batches or settings); "
                    "remove it to give them up, or name another"
                )
            return
        if names:
            raise SettingError(f"checkpoint: {folder} is not empty, and no checkpoint of ours; name another folder")

    def begin(self) -> None:
        """Make the folder, and say whose it is. Raises SourceError where that cannot be."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.folder}: cannot be made ({error}); name another folder") from error
        for left in self.folder.glob(f"{CACHE}*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        write_text(self.folder / JOB, json.dumps(self._job, indent=1))

    def read(self, position: int, name: str) -> tuple[dict[str, Tensor], BlockReport] | None:
        """The block's tensors and what was reported; None if it was not finished, or its file is damaged."""
        path = self._path(position)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                report = json.loads(metadata["report"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if metadata["digest"] != _digest(tensors, metadata["report"]):
                return None
            stored = BlockReport(**{**report, "layers": tuple(report["layers"])})
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None
        return (tensors, replace(stored, resumed=True)) if stored.name == name else None

    def write(self, position: int, tensors: Mapping[str, Tensor], report: BlockReport) -> None:
        """Keep a finished block."""
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(asdict(report))
        with atomic_path(self._path(position)) as temporary:
            save_file(plain, temporary, {"report": text, "digest": _digest(plain, text)})

    def _path(self, position: int) -> Path:
        return self.folder / f"{position:05d}.safetensors"


def _digest(tensors: Mapping[str, Tensor], report: str) -> str:
    ordered = {name: tensors[name] for name in sorted(tensors)}
    return tensors_digest({**ordered, "report": report})


def _stored(path: Path) -> dict[str, str] | None:
    """Whose blocks they are; None for what is no such file of ours."""
    try:
        found = load_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"model", "plan", "settings"} <= found.keys() else None
