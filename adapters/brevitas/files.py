"""A quantized Brevitas model in one file that carries its plan."""

import json
from pathlib import Path
from typing import cast

from brevitas.core.quant import TernaryQuant
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mpq_plugins.common.checks import path_of
from mpq_plugins.common.text import first_few
from mpq_plugins.errors import FormatError, MismatchError, SettingError
from mpq_plugins.models.copying import duplicate
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.match import match

from ..shared.carried import carried_json, read_carried, write_carrying
from ..shared.folded import planned_layers
from .graph import brevitas_settings_kept, load_quant_model_mode, quiet_state_dict
from .verification import verify_tuned

FORMAT = "mpq-brevitas"


def save(quantized: nn.Module, plan: Plan, path: Path | str) -> None:
    """Write a model's state and its plan as one safetensors file, atomically.

    Args:
        quantized: What `to_brevitas` made, tuned or not.
        plan: The plan.
        path: The file to write.

    Raises:
        VerifyError: The model does not hold the plan.
        SettingError: Some state is no tensor.
        SourceError: The file cannot be written.
    """
    verify_tuned(quantized, plan)
    ternary = [layer.name for layer in planned_layers(plan) if _is_ternary(quantized.get_submodule(layer.name))]
    with quiet_state_dict():
        write_carrying(quantized, plan, path_of("path", path), FORMAT, ternary=json.dumps(ternary))


def load(path: Path | str, model: nn.Module, plan: Plan | None = None) -> nn.Module:
    """Make a copy of a model converted by the file's own plan, with the file's weights, in evaluation mode.

    What is loaded can be exported and trained, and not tuned: its float weights are gone.

    Args:
        path: What `save` wrote.
        model: The network in float32, its weights of no matter; it is not changed.
        plan: Refuse a file of any other; by default the file's own is taken.

    Returns:
        The copy.

    Raises:
        FormatError: The file is none of `save`'s, or damaged.
        MismatchError: The file is of another plan, or of another network.
        SettingError: The arguments are no path and no module.
        VerifyError: The file was changed since it was saved.
    """
    from .conversion import to_brevitas

    if not isinstance(path, str | Path) or not isinstance(model, nn.Module):
        raise SettingError(f"load: takes a path and a module, not a {type(path).__name__} and a {type(model).__name__}")
    stored, metadata = read_carried(path_of("path", path), FORMAT, "brevitas.save", "ternary")
    ternary = carried_json(path_of("path", path), metadata["ternary"])
    if not isinstance(ternary, list) or not all(isinstance(name, str) for name in ternary):
        raise FormatError(f"{path}: ternary is {ternary!r}, no list of names: the file is damaged")
    if plan is not None and plan != stored:
        changed = [repr(difference.name) for difference in stored.diff(plan)]
        what = (
            f"layers {first_few(changed, ', ')} differ" if changed else "the layers agree, what else it says does not"
        )
        raise MismatchError(f"{path}: was quantized by another plan: {what}. Load it without a plan, or give its own")
    match(stored, model).require(type(model).__name__)
    blank = duplicate(model)
    for layer in stored.layers:
        cast(Tensor, blank.get_submodule(layer.name).weight).data.zero_()
    quantized = to_brevitas(blank, stored, ternary=ternary).eval()
    try:
        with brevitas_settings_kept(), load_quant_model_mode(quantized), quiet_state_dict():
            quantized.load_state_dict(_with_shared(load_file(path), quantized))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MismatchError(f"{path}: holds another network than {type(model).__name__} ({reason})") from error
    verify_tuned(quantized, stored)
    return quantized


def _with_shared(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The file has shared tensors under one name; Brevitas wants to be told of each."""
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    shared = {name: state[stored] for same in names.values() for stored in same if stored in state for name in same}
    return state | shared


def _is_ternary(module: nn.Module) -> bool:
    return isinstance(module.weight_quant.tensor_quant, TernaryQuant)  # type: ignore[union-attr]
