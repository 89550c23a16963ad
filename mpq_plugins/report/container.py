"""Containers as tables: each layer stage by stage, and what the whole file takes."""

from collections.abc import Mapping
from typing import Any

from ..compression.container import Container
from ..compression.stages import Stages, total
from .grid import Grid
from .tables import bits_text, bytes_text, grid


def layers_table(container: Container, stages: Mapping[str, Stages]) -> Grid:
    """Every layer of the plan, by stage."""
    rows = [(_layer(container, name), _bits(container, name), *_numbers(stage)) for name, stage in stages.items()]
    rows.append(("all", "", *_numbers(total(stages.values()))))
    columns = ("layer", "bits", "weights", "zeros", "entropy", "original", "sparse", "packed", "Huffman", "stored")
    return grid("", columns, rows, 2, ("entropy", "sparse", "zeros", "original", "packed", "Huffman", "weights"))


def totals_table(stages: Mapping[str, Stages]) -> Grid:
    """All layers together after each stage, and how many times smaller they are."""
    whole = total(stages.values())
    sparse = f"in float without {whole.sparsity:.1%} zeros, with gaps"
    sizes = [
        (f"original, {whole.weights:,} weights", whole.original),
        (sparse, whole.sparse),
        ("codes, packed", whole.packed),
        ("codes, Huffman", whole.huffman),
        ("codes, in the file", whole.stored),
    ]
    rows = [(stage, bytes_text(size), f"{whole.original / max(1, size):.2f}x") for stage, size in sizes]
    return grid("", ("layers", "size", "smaller"), rows)


def summary_lines(container: Container, stages: Mapping[str, Stages]) -> list[str]:
    """What the file takes, beside what its plan promised and what the source took."""
    whole = total(stages.values())
    sizes = _sizes(container, whole)
    text = {name: bytes_text(size) for name, size in sizes.items()}
    return [
        f"layers        {bytes_text(whole.stored)} in the file, {8 * whole.stored / max(1, whole.weights):.3f} bits a "
        f"weight, {whole.original / max(1, whole.stored):.2f}x smaller; their plan promised {text['planned_bytes']}",
        f"other tensors {text['other_tensors_bytes']}",
        f"plan, header  {text['plan_and_header_bytes']}",
        f"in total      {text['bytes']}, {sizes['source_bytes'] / container.size:.2f}x smaller than the source's "
        f"tensors, {text['source_bytes']}",
    ]


def container_json(container: Container, stages: Mapping[str, Stages]) -> dict[str, Any]:
    """Every figure."""
    whole = total(stages.values())
    return {
        "container": str(container.path),
        "made_with": container.header.made_with,
        "left_out": container.header.left_out,
        **_sizes(container, whole),
        "layers": {_layer(container, name): _json(stage) for name, stage in stages.items()},
        "all": _json(whole),
    }


def _sizes(container: Container, whole: Stages) -> dict[str, int]:
    """Bytes of the file and of its pieces, and what the source and the plan have for them."""
    others = sum(record.block_bytes for record in container.header.tensors if record.parts is None)
    return {
        "bytes": container.size,
        "source_bytes": whole.original + _others_original(container),
        "planned_bytes": container.plan.size().total_bytes,
        "other_tensors_bytes": others,
        "plan_and_header_bytes": container.size - whole.stored - others,
    }


def _others_original(container: Container) -> int:
    from ..checkpoints.readers import DTYPES

    others = [record for record in container.header.tensors if record.parts is None and record.same is None]
    return sum(container.values(record) * DTYPES[record.dtype].itemsize for record in others)


def _layer(container: Container, name: str) -> str:
    choice = container.choice(container.records[name])
    return name if choice is None else choice.name


def _bits(container: Container, name: str) -> str:
    return bits_text(container.choice(container.records[name]))


def _numbers(stage: Stages) -> tuple[str, ...]:
    sizes = (stage.original, stage.sparse, stage.packed, stage.huffman, stage.stored)
    return (f"{stage.weights:,}", f"{stage.sparsity:.1%}", f"{stage.entropy_per_weight:.3f}", *map(bytes_text, sizes))


def _json(stage: Stages) -> dict[str, Any]:
    derived = ("packed", "huffman", "sparsity", "entropy_per_weight")
    return {**vars(stage), **{name: getattr(stage, name) for name in derived}}
