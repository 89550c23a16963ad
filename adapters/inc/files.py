"""Saving what Neural Compressor quantized by our plans, and loading it, layers named fc1 and fc10 included."""

import contextlib
import io
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from torch import nn

from mpq_plugins.common.files import exists, write_text
from mpq_plugins.common.text import first_few, what_it_said
from mpq_plugins.errors import FormatError, MismatchError, SettingError, SourceError, VerifyError
from mpq_plugins.models.arguments import check_module
from mpq_plugins.models.copying import duplicate
from mpq_plugins.models.fingerprint import model_digest
from mpq_plugins.models.folding import folded_copy
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.match import match
from mpq_plugins.simulation.verify import verify

from ..shared.carried import read_carried, write_carrying
from ..shared.compressor_quiet import quiet, quiet_import
from .marks import mark, weights_digest

with quiet_import():
    from neural_compressor.torch.algorithms.weight_only.modules import WeightOnlyLinear
    from neural_compressor.torch.quantization import load as incs_load
    from neural_compressor.torch.quantization import save as incs_save

FORMAT = "mpq-inc"
WEIGHTS = "quantized_weight.safetensors"
QCONFIG = "qconfig.json"
# Neural Compressor's load returns None for an algorithm that is not its own; over this it stops, and quotes it.
NOTICE = "quantized by a plan: mpq_plugins.adapters.inc.load(folder, model) loads it"


def save(quantized: nn.Module, folder: Path | str = "saved_results") -> None:
    """Write a quantized model into a folder: its state with its plan, in float32 at the plan's levels.

    It is also the quantized model's own `save`, which Neural Compressor's calls. A model that was quantized by `to_inc`
    is saved by Neural Compressor. Biases and norms may have been corrected since.

    Args:
        quantized: The quantized model.
        folder: The folder to write into.

    Raises:
        VerifyError: A layer's weights are not those that it was quantized to (trained, say).
        SettingError: The model is not quantized.
        SourceError: Nothing can be written.
    """
    check_module(quantized)
    path = _folder(folder)
    plan = getattr(quantized, "mpq_plan", None)
    if not isinstance(plan, Plan):
        if not hasattr(quantized, "qconfig"):
            raise SettingError(f"{type(quantized).__name__}: is not quantized by Neural Compressor; quantize it first")
        with quiet():
            incs_save(quantized, str(path))
        return
    verify(quantized, plan)
    if weights_digest(quantized) != getattr(quantized, "mpq_weights", None):
        raise VerifyError(f"{type(quantized).__name__}: its weights are no longer the plan's; quantize it again")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SourceError(f"{folder}: cannot make this folder ({reason}). Choose another path.") from error
    write_carrying(quantized, plan, path / WEIGHTS, FORMAT, digest=model_digest(quantized))
    write_text(path / QCONFIG, json.dumps({NOTICE: {"plan": WEIGHTS}}, indent=2) + "\n")


def load(folder: Path | str, model: nn.Module) -> nn.Module:
    """Make a copy of the float model with the weights that `save` wrote, in evaluation mode.

    Folders of models that were quantized by `to_inc` are loaded by Neural Compressor, which takes what is not packed
    from the model.

    Args:
        folder: What `save` wrote.
        model: The float model; it is not changed.

    Returns:
        The copy.

    Raises:
        FormatError: There is no such folder, or it is damaged.
        MismatchError: The folder is of another network.
        VerifyError: A file was changed since it was saved.
    """
    check_module(model)
    path = _folder(folder)
    if not exists(path / WEIGHTS):
        return _load_native(path, model)
    plan, carried = read_carried(path / WEIGHTS, FORMAT, "inc.save", "digest")
    match(plan, model).require(type(model).__name__)
    quantized = folded_copy(model, plan)
    try:
        _check_dtypes(load_file(str(path / WEIGHTS)), quantized, folder)
        load_model(quantized, str(path / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MismatchError(f"{folder}: holds another network than {type(model).__name__} ({reason})") from error
    verify(quantized, plan)
    if model_digest(quantized) != carried["digest"]:
        raise VerifyError(f"{folder}: was changed since it was saved; save the model again")
    mark(quantized, plan, {("", type(quantized).__name__): None}, save)
    return quantized.eval()


def _check_dtypes(stored: dict[str, torch.Tensor], model: nn.Module, folder: object) -> None:
    state = model.state_dict()
    for name, value in stored.items():
        if name in state and state[name].dtype != value.dtype:
            raise MismatchError(
                f"{folder}: {name!r} is {value.dtype} there, {state[name].dtype} in {type(model).__name__}; convert it"
            )


def _load_native(folder: Path, model: nn.Module) -> nn.Module:
    if not exists(folder / QCONFIG):
        raise FormatError(f"{folder}: holds no {WEIGHTS} and no {QCONFIG}; give a folder that inc.save wrote")
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()):  # its loader prints
            # It builds on the model that it is given.
            loaded = incs_load(str(folder), original_model=duplicate(model))
    except Exception as error:  # it checks nothing that it reads
        raise FormatError(
            f"{folder}: Neural Compressor cannot load it into {type(model).__name__} ({what_it_said(error)}): it is "
            "damaged, or of another network"
        ) from error
    if not isinstance(loaded, nn.Module):
        raise FormatError(f"{folder}: Neural Compressor has no loader for the algorithm that it was saved by")
    packed = {name for name, module in loaded.named_modules() if isinstance(module, WeightOnlyLinear)}
    stored = {key.removesuffix(".qweight") for key in _stored_names(folder) if key.endswith("qweight")}
    lost = sorted(repr(name) for name in stored - packed if name != "qweight")
    if lost or not packed:
        raise MismatchError(
            f"{folder}: holds {first_few(lost, ', ') or 'no packed layer'}, which {type(model).__name__} lacks: it is "
            "of another network"
        )
    return loaded


def _stored_names(folder: Path) -> list[str]:
    return list(torch.load(folder / "quantized_weight.pt", weights_only=True))


def _folder(folder: object) -> Path:
    if not isinstance(folder, str | Path):
        raise SettingError(f"folder: is a {type(folder).__name__}; give a path")
    return Path(folder)
