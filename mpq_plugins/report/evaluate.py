"""Evaluated plans as a table, as CSV and as JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.evaluate import EvaluatedPlan
from .grid import Grid
from .rows_csv import write_csv
from .tables import bytes_text, grid

FLOAT_BITS = 32


def evaluated_table(rows: Sequence[EvaluatedPlan], weights: int, title: str) -> Grid:
    """One line for each model that was tried; weights: how many the planned layers have."""
    scores = list(rows[0].scores)
    lines = [
        (
            row.name, row.rounding, *_size(row, weights),
            *(f"{row.scores[name]:.4g}" for name in scores), f"{row.seconds:.2f}",
        )
        for row in rows
    ]  # fmt: skip
    return grid(title, ("plan", "rounding", "bits", "size", "smaller", *scores, "seconds"), lines, left=2)


def evaluated_csv(rows: Sequence[EvaluatedPlan], path: Path) -> None:
    """Write one line for each model that was tried; atomically."""
    write_csv([_flat(row) for row in rows], path)


def evaluated_json(rows: Sequence[EvaluatedPlan]) -> list[dict[str, Any]]:
    """The rows for programs."""
    return [
        {
            "plan": row.name,
            "rounding": row.rounding,
            "corrected": row.corrected,
            "total_bytes": None if row.size is None else row.size.total_bytes,
            "total_average_bits": FLOAT_BITS if row.size is None else row.size.total_average_bits,
            "scores": dict(row.scores),
            "seconds": row.seconds,
        }
        for row in rows
    ]


def _size(row: EvaluatedPlan, weights: int) -> tuple[str, str, str]:
    """Bits a weight in total, bytes, and how many times smaller than in 32 bits."""
    if row.size is None:
        return f"{FLOAT_BITS}", bytes_text(FLOAT_BITS // 8 * weights), "1.00x"
    return f"{row.size.total_average_bits:.3f}", bytes_text(row.size.total_bytes), f"{row.size.against_fp32:.2f}x"


def _flat(row: EvaluatedPlan) -> dict[str, Any]:
    (document,) = evaluated_json([row])
    scores = document.pop("scores")
    seconds = document.pop("seconds")
    return {**document, **{f"score_{name}": value for name, value in scores.items()}, "seconds": seconds}
