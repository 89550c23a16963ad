"""What a table's file says of layers' inputs: a description and two arrays, beside those of the weights."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from ..common.checks import shown
from ..common.documents import Strict
from ..errors import SettingError
from .activations import INPUT_BITS, Activations
from .stats import METRICS, Array, InputStats, Measured

ERRORS, SENSITIVITIES = "input_errors", "input_sensitivities"


class _Input(Strict):
    name: str
    numel: Annotated[int, Field(ge=1)]
    tensor: str


class InputsDocument(Strict):
    """layers: those that have an input, in the table's order."""

    activations: Activations
    bits: Annotated[tuple[int, ...], Field(min_length=1)]
    metrics: tuple[str, ...]
    sensitivities: tuple[str, ...]
    live: tuple[Annotated[tuple[str, ...], Field(min_length=1)], ...]
    layers: tuple[_Input, ...]

    @classmethod
    def of(cls, table: Measured) -> "InputsDocument | None":
        """What a table says; None where it says nothing of inputs. Raises SettingError for half of it."""
        held = _held(table)
        if table.activations is None:
            if held or table.input_bits or table.live:
                raise SettingError("table: activations: none are given, and there are inputs, input bits or live sets")
            return None
        first = next(iter(held.values()), None)
        return cls(
            activations=table.activations, bits=table.input_bits, metrics=tuple(first.errors) if first else (),
            sensitivities=tuple(first.sensitivities) if first else (), live=table.live,
            layers=tuple(_Input(name=name, numel=own.numel, tensor=own.tensor) for name, own in held.items()),
        )  # fmt: skip

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.bits) != sorted(set(self.bits)) or not set(self.bits) <= set(INPUT_BITS):
            raise ValueError(f"bits: {list(self.bits)} is not allowed; some of 2 to 16, ascending, each once")
        names = [layer.name for layer in self.layers]
        for field, listed in (("metrics", self.metrics), ("sensitivities", self.sensitivities), ("layers", names)):
            if len(set(listed)) < len(listed):
                raise ValueError(f"{field}: {list(listed)[:5]} has one twice")
        if unknown := [metric for metric in self.metrics if metric not in METRICS]:
            raise ValueError(f"metrics: {shown(unknown[0])} is not allowed; {', '.join(METRICS)}")
        tensors = {layer.tensor for layer in self.layers}
        if not tensors <= set(names):
            raise ValueError(f"layers: {min(tensors - {*names})!r} is named as a tensor, and is no layer with an input")
        for live in self.live:
            if len(set(live)) < len(live) or not set(live) <= tensors:
                raise ValueError(f"live: {list(live)[:5]} holds one twice, or what is no tensor")
        return self

    def check_layers(self, names: Sequence[str]) -> None:
        """Raise ValueError where these are not some of a table's layers, in its order."""
        known = {layer.name for layer in self.layers}
        if [layer.name for layer in self.layers] != [name for name in names if name in known]:
            raise ValueError("inputs: its layers are not the table's, in their order")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The arrays that it describes."""
        layers, widths = len(self.layers), len(self.bits)
        shapes = {ERRORS: (layers, len(self.metrics), widths), SENSITIVITIES: (layers, len(self.sensitivities), widths)}
        return {name: shape for name, shape in shapes.items() if shape[0] and shape[1]}

    def arrays(self, table: Measured) -> dict[str, Array]:
        """Those of a table."""
        held = list(_held(table).values())
        found = {
            ERRORS: [[own.errors[metric] for metric in self.metrics] for own in held],
            SENSITIVITIES: [[own.sensitivities[name] for name in self.sensitivities] for own in held],
        }
        return {name: np.array(found[name], np.float64) for name in self.shapes}

    def stats(self, arrays: Mapping[str, Array]) -> dict[str, InputStats]:
        """By layer, from its arrays."""
        return {
            layer.name: InputStats(
                layer.numel, layer.tensor,
                {metric: arrays[ERRORS][i, m] for m, metric in enumerate(self.metrics)},
                {name: arrays[SENSITIVITIES][i, k] for k, name in enumerate(self.sensitivities)},
            )
            for i, layer in enumerate(self.layers)
        }  # fmt: skip


def _held(table: Measured) -> dict[str, InputStats]:
    return {layer.name: layer.inputs for layer in table.layers if layer.inputs is not None}
