"""What a table says of layers' inputs, as a table for people and as JSON."""

from typing import Any

from ..plans.stats import InputStats
from ..plans.table import LayerTable
from .grid import Grid
from .tables import grid


def inputs_table(table: LayerTable) -> Grid:
    """What quantizing each layer's input costs, one column per width, by the first sensitivity, or error, there is."""
    held = _held(table)
    measures = {name: {**own.sensitivities, **own.errors} for name, own in held.items()}
    shown = next(iter(next(iter(measures.values()), {})), "")
    ties = any(own.tensor != name for name, own in held.items())
    rows = [
        (
            name, *([own.tensor] if ties else []), f"{own.numel:,}",
            *(f"{value:.4g}" for value in measures[name].get(shown, ())),
        )
        for name, own in held.items()
    ]  # fmt: skip
    columns = ("layer", *(["same tensor as"] if ties else []), "values", *(f"{b} bit" for b in table.input_bits))
    return grid(f"{shown} of quantized inputs, {ranges_text(table)}", columns, rows, 1 + ties, ("values",))


def inputs_line(table: LayerTable) -> str:
    """How many values a sample's inputs have, all together and at once."""
    held = _held(table)
    counts = {own.tensor: held[own.tensor].numel for own in held.values()}
    most = max((sum(counts[name] for name in live) for live in table.live), default=0)
    return f"inputs        {sum(counts.values()):,} values a sample, {most:,} at once"


def ranges_text(table: LayerTable) -> str:
    """`asymmetric mse`: how inputs were quantized, but for their width."""
    return "" if table.activations is None else table.activations.kind


def inputs_json(table: LayerTable) -> dict[str, Any]:
    """All that is known of inputs; nothing where nothing is."""
    if table.activations is None:
        return {}
    return {
        "activations": ranges_text(table),
        "input_bits": table.input_bits,
        "live": table.live,
        "inputs": {
            name: {
                "numel": own.numel, "tensor": own.tensor,
                "errors": {metric: values.tolist() for metric, values in own.errors.items()},
                "sensitivities": {kind: values.tolist() for kind, values in own.sensitivities.items()},
            }
            for name, own in _held(table).items()
        },
    }  # fmt: skip


def _held(table: LayerTable) -> dict[str, InputStats]:
    return {layer.name: layer.inputs for layer in table.layers if layer.inputs is not None}
