"""A table of types for people: what each layer loses as each type."""

from ..plans.type_table import TypeTable
from .grid import Grid
from .tables import grid

NOT_POSSIBLE = "-"


def types_table(table: TypeTable) -> Grid:
    """One row per layer, one column per type, of the first metric; a dash where a layer cannot have the type."""
    metric = table.metrics[0]
    rows = []
    for layer in table.base.layers:
        errors = [column.by_name.get(layer.name) for column in table.columns]
        shown = [NOT_POSSIBLE if one is None else f"{one.errors[metric][0]:.4g}" for one in errors]
        rows.append((layer.name, layer.kind, f"{layer.numel:,}", *shown))
    columns = ("layer", "kind", "weights", *(kind.name for kind in table.types))
    return grid(f"{metric} error of each type", columns, rows, 2, ("kind", "weights"))


def types_json(table: TypeTable) -> dict[str, object]:
    """Every layer's errors and sensitivities as each type that it can have."""
    layers: dict[str, object] = {}
    for layer in table.base.layers:
        having = [(column.type, column.by_name[layer.name]) for column in table.columns if layer.name in column.by_name]
        layers[layer.name] = {
            "kind": layer.kind,
            "numel": layer.numel,
            "types": {
                kind.name: {
                    "bits_a_weight": kind.bits_a_weight(_outputs_first(layer.shape, layer.channel_axis)),
                    "errors": {metric: float(values[0]) for metric, values in one.errors.items()},
                    "sensitivities": {name: float(values[0]) for name, values in one.sensitivities.items()},
                }
                for kind, one in having
            },
        }
    return layers


def _outputs_first(shape: tuple[int, ...], channel_axis: int) -> tuple[int, ...]:
    return (shape[channel_axis], *(side for axis, side in enumerate(shape) if axis != channel_axis))
