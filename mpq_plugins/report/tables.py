"""Plans, sizes, differences and measurements as rich tables."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..common.registry import Plugin
from ..common.text import printable
from ..plans.capabilities import Change
from ..plans.layers import LayerChoice, width_text
from ..plans.plan import Difference, Plan
from ..plans.size import PlanSize
from ..plans.table import LayerTable
from .grid import Column, Grid

CODES_ALONE = "entropy-coded plans: bits and size are those of their codes in the file, whose header comes on top"


def grid(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1, leave_out: Sequence[str] = ()
) -> Grid:
    """A table whose first `left` columns are text and whose others are numbers.

    leave_out: what goes first where the width does not do for all columns; the others go from the right. The first
    column stays; single words in it are names, which may be shortened.
    """
    cells = [tuple(map(printable, row)) for row in rows]
    names = not any(" " in row[0] for row in cells)
    made = (
        Column(printable(heading), tuple(row[place] for row in cells), number=place >= left, name=names and not place)
        for place, heading in enumerate(columns)
    )
    return Grid(printable(title), tuple(made), tuple(map(printable, leave_out)))


def bits_text(layer: LayerChoice | None) -> str:
    """A layer's `bits_text`; `-` for a layer that is not there."""
    return "-" if layer is None else layer.bits_text


def bits_summary(plan: Plan, size: PlanSize) -> Grid:
    """How many layers, channels and weights get how many bits; a layer with parts counts at each of its widths.

    Layers whose codes are promised a size in an entropy-coded file stand apart, at the bits that are promised.
    """
    layers: Counter[_Width] = Counter()
    channels: Counter[_Width] = Counter()
    weights: Counter[_Width] = Counter()
    coded = [layer for layer in plan.layers if layer.coded_bytes is not None]
    for layer in plan.layers:
        for part in layer.all_parts:
            text = layer.type or width_text(part.bits)
            width = (0, "coded") if layer.coded_bytes is not None else (part.bits, text)
            layers[width] += 1
            channels[width] += len(part.channels)
            weights[width] += len(part.channels) * (layer.numel // max(1, layer.channels))
    rows = [
        (
            _coded_text(coded) if width[1] == "coded" else width[1],
            layers[width],
            f"{channels[width]:,}",
            f"{weights[width]:,}",
            f"{weights[width] / max(1, size.numel):.1%}",
        )
        for width in sorted(layers)
    ]
    return grid("", ("bits", "layers", "channels", "weights", "share"), rows)


_Width = tuple[int, str]
"""A width and its text, in which order they are listed."""


def _coded_text(layers: Sequence[LayerChoice]) -> str:
    """`1.25 coded`: what layers are promised, over all of their weights."""
    return f"{sum(layer.code_bits for layer in layers) / max(1, sum(layer.numel for layer in layers)):.2f} coded"


def size_lines(size: PlanSize) -> list[str]:
    """The accountings in words: codes alone, all of the planned layers, and the whole model where that is known."""
    intervals = sum(layer.intervals for layer in size.layers.values())
    books = ", codebooks" if any(layer.codebooks for layer in size.layers.values()) else ""
    share = f", {intervals / max(1, size.numel):.3f} of it telling the region" if intervals else ""
    whole = [] if size.model_bytes is None else [f"whole model   {bytes_text(size.model_bytes)}: {_beside_text(size)}"]
    smaller = f"{size.against_fp32:.2f}x smaller than fp32, {size.against_int8:.2f}x than int8"
    return [
        f"weights only  {bytes_text(size.weights_only_bytes)}, {size.average_bits:.3f} bits a weight{share}",
        f"in total      {bytes_text(size.total_bytes)}, {size.total_average_bits:.3f} bits a weight, with scales, zero "
        f"points{books} and channel maps: {smaller}",
        *whole,
    ]


def _beside_text(size: PlanSize) -> str:
    """What of a model is not planned, in bytes and in words."""
    assert size.rest_bytes is not None
    layers = f", {size.skipped} skipped layer{'s' * (size.skipped > 1)}" if size.skipped else ""
    return (
        f"{bytes_text(size.total_bytes)} in total and {bytes_text(size.rest_bytes)} that is not planned, as it is "
        f"stored (biases, norms, buffers{layers})"
    )


def bytes_text(count: int) -> str:
    """`1.07 MB`: decimal units."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"


def plan_table(plan: Plan) -> Grid:
    """Every layer of a plan."""
    sizes = plan.size().layers
    schemes = ["scheme"] if len({layer.scheme for layer in plan.layers}) > 1 else []  # one is said above the table
    inputs = ["input"] if plan.quantizes_inputs else []
    rows = [
        (
            layer.name, layer.kind, "x".join(map(str, layer.shape)), *(str(layer.scheme) for _ in schemes),
            bits_text(layer), *(_input_text(layer) for _ in inputs), f"{layer.numel:,}",
            bytes_text(-(-sizes[layer.name].total // 8)),
        )
        for layer in plan.layers
    ]  # fmt: skip
    return grid(
        "",
        ("layer", "kind", "shape", *schemes, "bits", *inputs, "weights", "size"),
        rows,
        3 + len(schemes),
        ("kind", "shape", "weights"),
    )


def _input_text(layer: LayerChoice) -> str:
    """Bits of a layer's input; `float` where it is not quantized, and nothing where it takes indices."""
    if layer.kind == "embedding":
        return ""
    return "float" if layer.activation_bits is None else str(layer.activation_bits)


def file_lines(plan: Plan) -> list[str]:
    """What the plan promises of its file, where it was made for one."""
    bytes_, bits = (plan.allocator.found.get(name) for name in ("file_bytes", "file_bits"))
    if not isinstance(bits, int | float):
        return []
    whole = f"{bytes_text(bytes_)} entropy coded" if isinstance(bytes_, int) else "entropy coded, predicted"
    return [f"file          {whole}; {bits:.3f} bits a weight, with its header and without other tensors"]


def plan_head(plan: Plan) -> str:
    """One line: who made it, for how many layers, how small it is."""
    size = plan.size()
    skipped = f", {len(plan.skipped)} skipped" if plan.skipped else ""
    activations = f", activations {plan.activations_text}" if plan.quantizes_inputs else ""
    return (
        f"{plan.allocator.name}: {len(plan.layers)} layers{skipped}, {size.total_average_bits:.2f} bits a weight in "
        f"total, {bytes_text(size.total_bytes)}{activations}"
    )


def diff_table(differences: Sequence[Difference]) -> Grid:
    """The layers in which two plans differ."""
    rows = [(d.name, bits_text(d.before), bits_text(d.after), _what_else(d)) for d in differences]
    return grid("", ("layer", "before", "after", "also"), rows)


def measurement_table(table: LayerTable) -> Grid:
    """The errors of a measurement: one row per layer, one column per bit-width, of its first metric."""
    metric = table.metrics[0]
    rows = [
        (
            layer.name, layer.kind, f"{layer.numel:,}", f"{layer.importance:.4g}",
            *([f"{layer.macs:,}"] if layer.macs is not None else []),
            *(f"{error:.4g}" for error in layer.errors[metric]),
        )
        for layer in table.layers
    ]  # fmt: skip
    macs = ["MACs"] if any(layer.macs is not None for layer in table.layers) else []
    columns = ("layer", "kind", "weights", "sum |w|", *macs, *(f"{b} bit" for b in table.bits))
    return grid(f"{metric} error, {table.scheme}", columns, rows, 2, ("kind", "sum |w|", "MACs", "weights"))


def changes_table(changes: Sequence[Change]) -> Grid:
    """What a backend makes of a plan, layer by layer, and what that costs in bits of the whole layer."""
    rows = [(c.layer, c.before, c.after, c.why, f"{c.cost:+,}" if c.cost else "") for c in changes]
    return grid("", ("layer", "planned", "becomes", "because", "bits"), rows, 4, ("because", "bits"))


def plugins_table(plugins: Sequence[Plugin]) -> Grid:
    """What is installed."""
    rows = [(plugin.group, plugin.name, plugin.distribution, plugin.target) for plugin in plugins]
    return grid("", ("kind", "name", "from", "entry point"), rows, 4, ("entry point", "from"))


def size_json(size: PlanSize) -> dict[str, Any]:
    """Every figure of a size."""
    names = (
        "numel", "weights_only_bits", "weights_only_bytes", "average_bits", "total_bits", "total_bytes",
        "total_average_bits", "against_fp32", "against_int8", "rest_bytes", "model_bytes",
    )  # fmt: skip
    return {name: getattr(size, name) for name in names}


def layer_json(layer: LayerChoice | None) -> Any:
    """A layer's bits (16 and 32 for float16 and float32), or its parts, or null; with what its codes are promised."""
    if layer is None:
        return None
    dumped = layer.model_dump(mode="json", exclude_none=True)
    said = [name for name in ("parts", "bits", "coded_bytes") if name in dumped]
    return dumped["bits"] if said == ["bits"] else {name: dumped[name] for name in said}


def _what_else(difference: Difference) -> str:
    before, after = difference.before, difference.after
    if before is None or after is None:
        return "only in the other plan" if before is None else "only in the first plan"
    changed = [
        field
        for field in ("kind", "shape", "channel_axis", "scheme", "activations", "tied")
        if getattr(before, field) != getattr(after, field)
    ]
    if bits_text(before) == bits_text(after):
        changed += ["which channels"] * (before.parts != after.parts)
        changed += ["coded_bytes"] * (before.coded_bytes != after.coded_bytes)
    return ", ".join(changed)
