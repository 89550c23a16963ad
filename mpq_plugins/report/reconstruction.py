"""A reconstruction's blocks as a table and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..plans.plan import Plan
from ..reconstruction.settings import BlockReport
from .grid import Grid
from .tables import grid

COLUMNS = ("block", "layers", "bits", "loss to nearest", "learned", "codes changed", "seconds")


def reconstruction_table(reports: Sequence[BlockReport], plan: Plan) -> Grid:
    """One row a block, and their sum; losses are means a sample on the calibration inputs."""
    rows = [_words(report, plan) for report in reports]
    if len(reports) > 1:
        changed, weights = sum(block.changed for block in reports), sum(block.weights for block in reports)
        seconds = sum(block.seconds for block in reports)
        layers = sum(len(block.layers) for block in reports)
        rows.append(("all", str(layers), "", "", "", f"{changed / max(1, weights):.1%}", f"{seconds:.1f}"))
    return grid("", COLUMNS, rows, leave_out=("seconds", "layers", "codes changed"))


def reconstruction_json(reports: Sequence[BlockReport], plan: Plan) -> dict[str, Any]:
    """The same as plain values."""
    size = plan.size()
    return {
        "average_bits": size.average_bits,
        "total_average_bits": size.total_average_bits,
        "blocks": [asdict(report) for report in reports],
    }


def _words(report: BlockReport, plan: Plan) -> tuple[str, ...]:
    bits = sum(plan.by_any_name[layer].code_bits for layer in report.layers)
    return (
        report.name, str(len(report.layers)), f"{bits / max(1, report.weights):.2f}", f"{report.nearest:.4g}",
        f"{report.learned:.4g}" if report.learned < report.nearest else "no better",
        f"{report.changed / max(1, report.weights):.1%}", f"{report.seconds:.1f}",
    )  # fmt: skip
