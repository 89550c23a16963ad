"""A safetensors file that carries the plan its weights were quantized by."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import Tensor, nn

from mpq_plugins.common.checksum import FIELD, checksum_text, is_damaged, sealed
from mpq_plugins.common.documents import parse_json
from mpq_plugins.common.files import atomic_path
from mpq_plugins.common.text import first_few
from mpq_plugins.errors import FormatError, SettingError
from mpq_plugins.models.fingerprint import tensor_bytes
from mpq_plugins.plans.plan import Plan


def write_carrying(model: nn.Module, plan: Plan, path: Path, format_name: str, **more: str) -> None:
    """Write a model's state with its plan, atomically; shared tensors once.

    Raises SettingError for state that is no tensor, SourceError where the file cannot be written.
    """
    odd = [repr(name) for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if odd:
        raise SettingError(f"save: {first_few(odd, ', ')} in the state dict are no tensors, which the file cannot hold")
    with atomic_path(path) as temporary:
        metadata = {"format": format_name, "plan": plan.to_json(), "tensors": _digest(model.state_dict()), **more}
        save_model(model, str(temporary), sealed(metadata))


def read_carried(path: Path, format_name: str, writer: str, *more: str) -> tuple[Plan, dict[str, str]]:
    """The plan and what else a file carries. Raises FormatError, naming `writer`, for what is no such file."""
    try:
        with safe_open(str(path), framework="pt") as stored:
            metadata: dict[str, str] = stored.metadata() or {}
            names = stored.keys() if FIELD in metadata else ()  # of older versions, which have none
            digest = _digest({name: stored.get_tensor(name) for name in names})
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: cannot read it ({error}); give what {writer} wrote") from error
    if metadata.get("format") != format_name or not {"plan", *more} <= metadata.keys():
        raise FormatError(f"{path}: carries no plan; give what {writer} wrote")
    # The library adds to the metadata which tensors are shared.
    ours = {name: metadata[name] for name in ("format", "plan", "tensors", *more, FIELD) if name in metadata}
    if is_damaged(ours) or (FIELD in ours and digest != ours.get("tensors")):
        raise FormatError(f"{path}: is damaged, its checksum is another's; write or fetch it again")
    return Plan.from_document(carried_json(path, metadata["plan"]), str(path)), metadata


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of a model's tensors, shared ones once, whatever name the file has them under."""
    digests = {
        checksum_text(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor_bytes(tensor).tobytes())
        for tensor in tensors.values()
    }
    return checksum_text(" ".join(sorted(digests)).encode())


def carried_json(path: Path, text: str) -> Any:
    """What a piece of the file's own text says. Raises FormatError."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise FormatError(f"{path}: carries a plan that is no JSON ({error}): the file is damaged") from error
