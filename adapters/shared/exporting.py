"""What exporters of checkpoints share: writing a directory tensor by tensor, and reading it back."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mpq_plugins.checkpoints.checkpoint import read_checkpoint
from mpq_plugins.checkpoints.readers import StoredTensor
from mpq_plugins.common.files import CONFIG_NAME, WEIGHT_SUFFIXES, atomic_directory, exists, unchanged
from mpq_plugins.common.progress import Progress
from mpq_plugins.common.text import first_few
from mpq_plugins.errors import SettingError, VerifyError
from mpq_plugins.plans.layers import LayerChoice

from ..contract import Exported, LayerCheck
from .float_checkpoint import FloatCheckpoint
from .layer_codes import Scales, code_chunks, code_problem
from .shard_writer import ShardWriter

OTHER_WEIGHTS = (*WEIGHT_SUFFIXES, ".gguf", ".onnx", ".h5", ".msgpack", ".npz", ".ot", ".onnx_data")
"""Of files that hold weights, and would still be the float ones beside the export."""

Encode = Callable[[str, LayerChoice, StoredTensor], dict[str, Tensor]]
"""The tensors, by name, that stand for a layer: its parameter's name, its choice, and where its weight is."""


class Found:
    """The tensors that were read back, and which of them have been asked for."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors = tensors
        self.asked: set[str] = set()

    def take(self, name: str, shape: Iterable[int], *dtypes: torch.dtype) -> Tensor:
        """A tensor of this shape and one of these dtypes. Raises VerifyError."""
        stored = self.stored(name)
        if stored is None:
            raise VerifyError(f"{name!r} is missing")
        if tuple(stored.shape) != tuple(shape) or stored.foreign or stored.dtype not in dtypes:
            said = stored.foreign or stored.dtype
            raise VerifyError(f"{name!r} is {said} of shape {list(stored.shape)}, not {dtypes[0]} of {list(shape)}")
        return stored.tensor()

    def stored(self, name: str) -> StoredTensor | None:
        """Where a tensor lies; None where there is none."""
        self.asked.add(name)
        return self.tensors.get(name)

    @property
    def others(self) -> list[str]:
        """What nobody has asked for."""
        return [name for name in self.tensors if name not in self.asked]


@dataclass(frozen=True)
class Decoded:
    """A layer that was read back. codes: int8 (channels, inputs), as the plan's; stored: what held them, in words."""

    codes: Tensor
    scales: Scales
    stored: str

    def problem(self, choice: LayerChoice, stored: StoredTensor) -> str | None:
        """How it differs from the plan's integers of a weight, in words; None where it does not."""
        return code_problem(code_chunks(stored.read_rows, choice), self.codes, self.scales)


class ReadBack(Protocol):
    """A layer that was read back, whatever it is kept as."""

    @property
    def stored(self) -> str:
        """What held it, in words."""

    def problem(self, choice: LayerChoice, stored: StoredTensor) -> str | None:
        """How it differs from what the plan makes of a weight, in words; None where it does not."""


Decode = Callable[[str, LayerChoice, Found], ReadBack]
"""Reads one layer back. Raises VerifyError."""


class Meter:
    """Says how many weights are done."""

    def __init__(self, source: FloatCheckpoint, progress: Progress | None) -> None:
        self.progress, self.done = progress, 0
        self.total = sum(choice.numel for _, choice in source.coded_weights)

    def start(self, choice: LayerChoice) -> None:
        """Before the work on a layer."""
        if self.progress is not None:
            self.progress(choice.name, self.done, self.total)
        self.done += choice.numel

    def finish(self) -> None:
        """After all work."""
        if self.progress is not None:
            self.progress("", self.total, self.total)


def write_directory(  # what formats differ in
    source: FloatCheckpoint,
    output: Path,
    encode: Encode,
    files: Mapping[str, Mapping[str, Any]],
    *,
    notes: Callable[[], Iterable[str]] = tuple,
    writing: Callable[[Path], ShardWriter] = ShardWriter,
    progress: Progress | None = None,
) -> Exported:
    """Write the checkpoint with each coded layer as `encode` has it, all other tensors as they are, and other files.

    files: name -> JSON document, config.json among them; notes: asked for when every layer is written; writing: makes
    what keeps and writes the tensors. Raises SettingError where the output cannot be there, SourceError where reading
    or writing fails.
    """
    _check_output(source.path, output)
    meter, layers, layer_bytes = Meter(source, progress), 0, 0
    with atomic_directory(output) as temporary, unchanged(source.path):
        writer = writing(temporary)
        for parameter, stored in source.tensors.items():
            choice = source.coded(parameter)
            if source.is_copy(parameter):
                continue
            if choice is None:
                writer.put(parameter, source.in_float(parameter))
                continue
            meter.start(choice)
            layer_bytes += sum(writer.put(*named) for named in encode(parameter, choice, stored).items())
            layers += 1
        writer.finish()
        _copy_others(source.path, temporary, files)
        for name, document in files.items():
            (temporary / name).write_text(json.dumps(document, indent=2) + "\n")
        temporary.chmod(source.path.stat().st_mode & 0o777)
    meter.finish()
    return Exported(output, layers, layer_bytes, writer.total, tuple(notes()))


def _check_output(source: Path, output: Path) -> None:
    if output.resolve() == source.resolve() or source.resolve() in output.resolve().parents:
        raise SettingError(f"output: {output} is in the source; name a directory beside it")
    if exists(output) and (not output.is_dir() or any(output.iterdir())):
        raise SettingError(f"output: {output} exists; a checkpoint is a directory, so name a new or empty one")


def _copy_others(source: Path, target: Path, written: Iterable[str]) -> None:
    """Tokenizer, generation settings, the model's own code: whatever is no weight."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and not path.name.endswith(OTHER_WEIGHTS) and str(relative) not in written:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


def verify_directory(
    exported: Path,
    source: FloatCheckpoint,
    decode: Decode,
    files: Mapping[str, Mapping[str, Any]],
    *,
    reading: Callable[[Mapping[str, StoredTensor]], Found] = Found,
    progress: Progress | None = None,
) -> tuple[LayerCheck, ...]:
    """Compare every code, scale, zero point, float tensor and configuration of a directory with the plan's.

    reading: makes what finds the tensors. Raises VerifyError, listing what is wrong; SourceError where files cannot be
    read.
    """
    found = reading(read_checkpoint(exported).tensors)
    meter, checks = Meter(source, progress), list[LayerCheck]()
    problems = [problem for name, document in files.items() if (problem := _file_problem(exported / name, document))]
    for parameter, stored in source.tensors.items():
        choice = source.coded(parameter)
        if source.is_copy(parameter):
            continue
        try:
            if choice is None:
                _check_float(parameter, source, found)
                continue
            meter.start(choice)
            decoded = decode(parameter, choice, found)
            problem = decoded.problem(choice, stored)
        except VerifyError as error:
            problems.append(str(error))
            continue
        if problem is None:
            checks.append(LayerCheck.of(choice, decoded.stored))
        else:
            problems.append(f"{choice.name!r} {problem}")
    problems += [f"{name!r} is no tensor of the export" for name in found.others]
    if problems:
        raise VerifyError(f"{exported} does not hold the plan: {first_few(problems)}")
    meter.finish()
    return tuple(checks)


def _check_float(parameter: str, source: FloatCheckpoint, found: Found) -> None:
    expected = source.in_float(parameter)
    stored = found.take(parameter, expected.shape, expected.dtype)
    if not _bytes(stored).equal(_bytes(expected)):
        raise VerifyError(f"{parameter!r} is not the model's own, and the plan leaves it in float")


def _bytes(tensor: Tensor) -> Tensor:
    """NaN is equal to itself so."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _file_problem(path: Path, document: Mapping[str, Any]) -> str | None:
    try:
        same = json.loads(path.read_text()) == json.loads(json.dumps(document))
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be read ({error})"
    return None if same else f"{path.name} is not what the export writes for this plan"


def configured(source: FloatCheckpoint, **sections: Any) -> dict[str, dict[str, Any]]:
    """The model's config.json with these sections, as one of the files to write."""
    return {CONFIG_NAME: {**source.config, **sections}}
