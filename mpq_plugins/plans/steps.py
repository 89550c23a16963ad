"""Plans whose layers have steps: given to them, and scaled."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..errors import SettingError
from .entropy_coded import EntropyCoded
from .plan import Plan


def with_steps(plan: Plan, steps: Mapping[str, float], coded_bytes: Mapping[str, int | None]) -> Plan:
    """The plan with these steps and what the layers' codes take in a file, None where that is not known; by layer name.

    Steps are rounded to float32, as they are computed with. Layers under another scheme stay as they are.
    """
    layers = []
    for layer in plan.layers:
        if isinstance(layer.scheme, EntropyCoded) and layer.name in steps:
            scheme = _with_step(layer.scheme, steps[layer.name], layer.name)
            layer = layer.model_copy(update={"scheme": scheme, "coded_bytes": coded_bytes[layer.name]})
        layers.append(layer)
    return plan.model_copy(update={"layers": tuple(layers)})


def made_for_file(plan: Plan) -> bool:
    """Tell whether it is a plan of steps that were made for a file's bytes, which `fit_file` meets."""
    asked = (plan.allocator.parameters.get(name) for name in ("file_bits", "file_size"))
    return bool(steps_of(plan)) and any(value is not None for value in asked)


def steps_of(plan: Plan) -> dict[str, float]:
    """The step of each layer that has one."""
    return {
        layer.name: layer.scheme.step
        for layer in plan.layers
        if isinstance(layer.scheme, EntropyCoded) and layer.scheme.step is not None
    }


def _with_step(scheme: EntropyCoded, step: float, layer: str) -> EntropyCoded:
    """Raises SettingError, naming the layer, for a step that is none."""
    try:
        return replace(scheme, step=float(np.float32(step)))
    except SettingError as error:
        raise SettingError(f"layer {layer!r}: {error}") from error
