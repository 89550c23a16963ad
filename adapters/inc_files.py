"""Saving what Neural Compressor quantized by our plans, and loading it, layers named fc1 and fc10 included."""

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from mpq_plugins.apply import verify
from mpq_plugins.errors import FormatError, MismatchError, SettingError, SourceError
from mpq_plugins.files import write_text
from mpq_plugins.fold import fold_batch_norm
from mpq_plugins.match import match
from mpq_plugins.plan import Plan

from .carried import read_carried, write_carrying
from .folded import check_module
from .inc_quiet import quiet, quiet_import

with quiet_import():
    from neural_compressor.torch.quantization import load as incs_load
    from neural_compressor.torch.quantization import save as incs_save

FORMAT = "mpq-inc"
WEIGHTS = "quantized_weight.safetensors"
QCONFIG = "qconfig.json"
# Neural Compressor's load returns None for an algorithm that is not its own; over this it stops, and quotes it.
NOTICE = "quantized by a plan: mpq_plugins.adapters.inc.load(folder, model) loads it"


def save(quantized: nn.Module, folder: Path | str = "saved_results") -> None:
    """Write a quantized model into a folder: its state with its plan, in float32 at the plan's levels.

    It is also the quantized model's own `save`, which Neural Compressor's calls. A model that was quantized by
    `to_inc` is saved by Neural Compressor. Raises VerifyError where the weights are no longer the plan's (trained,
    say), SettingError for a model that is not quantized, SourceError where nothing can be written.
    """
    check_module(quantized)
    plan = getattr(quantized, "mpq_plan", None)
    if not isinstance(plan, Plan):
        if not hasattr(quantized, "qconfig"):
            raise SettingError(f"{type(quantized).__name__}: is not quantized by Neural Compressor; quantize it first")
        with quiet():
            incs_save(quantized, str(folder))
        return
    verify(quantized, plan)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"{folder}: cannot make this folder ({error.strerror}). Choose another path.") from error
    write_carrying(quantized, plan, folder / WEIGHTS, FORMAT)
    write_text(folder / QCONFIG, json.dumps({NOTICE: {"plan": WEIGHTS}}, indent=2) + "\n")


def load(folder: Path | str, model: nn.Module) -> nn.Module:
    """A copy of the float `model` with the weights that `save` wrote, in evaluation mode.

    Folders of models that were quantized by `to_inc` are loaded by Neural Compressor. Raises FormatError (no such
    folder, or damaged), MismatchError (another network), VerifyError (a file changed since it was saved).
    """
    check_module(model)
    folder = Path(folder)
    if not (folder / WEIGHTS).exists():
        return _load_native(folder, model)
    plan, _ = read_carried(folder / WEIGHTS, FORMAT, "inc.save")
    match(plan, model).require(type(model).__name__)
    quantized = fold_batch_norm(model) if plan.fold_bn else copy.deepcopy(model)
    try:
        load_model(quantized, str(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MismatchError(f"{folder}: holds another network than {type(model).__name__} ({reason})") from error
    verify(quantized, plan)
    cast(Any, quantized).mpq_plan = plan
    return quantized.eval()


def _load_native(folder: Path, model: nn.Module) -> nn.Module:
    if not (folder / QCONFIG).exists():
        raise FormatError(f"{folder}: holds no {WEIGHTS} and no {QCONFIG}; give a folder that inc.save wrote")
    with quiet(), contextlib.redirect_stdout(io.StringIO()):  # its loader prints
        # It builds on the model that it is given.
        loaded = incs_load(str(folder), original_model=copy.deepcopy(model))
    if not isinstance(loaded, nn.Module):
        raise FormatError(f"{folder}: Neural Compressor has no loader for the algorithm that it was saved by")
    return loaded
