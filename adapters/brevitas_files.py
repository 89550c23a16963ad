"""A quantized Brevitas model in one file that carries its plan."""

import json
import warnings
from pathlib import Path
from typing import Any

from brevitas.core.quant import TernaryQuant
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from mpq_plugins.errors import FormatError, MismatchError, first_few
from mpq_plugins.files import atomic_path
from mpq_plugins.plan import Plan

from .brevitas_graph import brevitas_settings_kept, load_quant_model_mode
from .brevitas_verify import verify
from .folded import planned_layers

FORMAT = "mpq-brevitas"


def save(quantized: nn.Module, plan: Plan, path: Path | str) -> None:
    """Write a model's state and its plan as one safetensors file, atomically.

    Raises VerifyError where the model does not hold the plan; SourceError where the file cannot be written.
    """
    verify(quantized, plan)
    ternary = [layer.name for layer in planned_layers(plan) if _is_ternary(quantized.get_submodule(layer.name))]
    metadata = {"format": FORMAT, "plan": plan.to_json(), "ternary": json.dumps(ternary)}
    with atomic_path(Path(path)) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Positional args are being deprecated", FutureWarning)  # Brevitas's own
        save_model(quantized, str(temporary), metadata)


def load(path: Path | str, model: nn.Module, plan: Plan | None = None) -> nn.Module:
    """A copy of `model` converted by the file's own plan, with the file's weights, in evaluation mode.

    model: the network in float, its weights of no matter. plan: refuse a file of any other. Raises FormatError (not
    such a file, or damaged) and MismatchError (another plan, or another network).
    """
    from .brevitas import to_brevitas

    metadata = _metadata(path)
    stored = Plan.from_document(json.loads(metadata["plan"]), str(path))
    if plan is not None and plan != stored:
        changed = [repr(difference.name) for difference in stored.diff(plan)]
        what = (
            f"layers {first_few(changed, ', ')} differ" if changed else "the layers agree, what else it says does not"
        )
        raise MismatchError(f"{path}: was quantized by another plan: {what}. Load it without a plan, or give its own")
    quantized = to_brevitas(model, stored, ternary=json.loads(metadata["ternary"])).eval()
    try:
        with brevitas_settings_kept(), load_quant_model_mode(quantized):
            load_model(quantized, str(path))
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()
        raise MismatchError(
            f"{path}: holds another network than {type(model).__name__} ({' '.join(reason)[:300]})"
        ) from error
    verify(quantized, stored)
    return quantized


def _metadata(path: Path | str) -> dict[str, str]:
    try:
        with safe_open(str(path), framework="pt") as stored:
            metadata: dict[str, Any] = stored.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: cannot read it ({error}); give a file that brevitas.save wrote") from error
    if metadata.get("format") != FORMAT or not {"plan", "ternary"} <= metadata.keys():
        raise FormatError(f"{path}: carries no plan; give a file that brevitas.save wrote")
    return metadata


def _is_ternary(module: nn.Module) -> bool:
    return isinstance(module.weight_quant.tensor_quant, TernaryQuant)  # type: ignore[union-attr]
