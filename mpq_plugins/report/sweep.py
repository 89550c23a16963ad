"""A sweep's rows as a table, as CSV and as JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.sweep import SweepRow, by_files
from ..plans.table import LayerTable
from .details import value_text
from .grid import Grid
from .rows_csv import write_csv
from .tables import CODES_ALONE, bytes_text, grid

MARK = "*"
IN_TOTAL = "bits: a weight, in total"
IN_FILES = (
    "file: the whole of it, header and other tensors too; file bits: all but other tensors, for each planned weight; "
    "the float model as it is stored"
)
ASKED = ("average_bits", "file_bits", "qem", "bits")  # the first that is a number


def sweep_table(rows: Sequence[SweepRow], title: str) -> Grid:
    """One line per plan, by size, the file's where there is one; the ones that no other beats are marked."""
    varying, files = varying_parameters(rows), by_files(rows)
    error, scores = next(iter(rows[0].errors), None), list(rows[0].scores)
    lines = [
        (
            row_label(row, varying), *_size(row, files),
            *([_number(row.errors.get(error))] if error is not None else ()),
            *(_number(row.scores.get(name)) for name in scores), MARK if row.pareto else "",
        )
        for row in sorted(rows, key=lambda row: (row.file_bytes or 0) if files else row.total_bytes)
    ]  # fmt: skip
    swept = next((row.allocator for row in rows if row.allocator not in ("float", "uniform")), "")
    head = (
        "" if any(row.series for row in rows) else ", ".join(name.replace("_", " ") for name in varying.get(swept, ()))
    )
    errors = [f"predicted {error}"] if error is not None else []
    bits, size = ("file bits", "file") if files else ("bits", "size")
    columns = (f"plan, {head}" if head else "plan", bits, size, *errors, *scores, MARK)
    # What is left says at least how small and how good.
    return grid(title, columns, lines, leave_out=(*(errors if scores else ()), *reversed(scores[1:]), bits))


def _size(row: SweepRow, files: bool) -> tuple[str, str]:
    """Bits a weight and bytes: of the file, or of the planned layers in total."""
    if files and row.file_bytes is not None:
        return f"{row.file_bits:.3f}", bytes_text(row.file_bytes)
    return f"{row.total_average_bits:.3f}", bytes_text(row.total_bytes)


def sweep_notes(rows: Sequence[SweepRow]) -> list[str]:
    """What the mark means, whether uniform plans win, and what the table could not tell."""
    what = next(iter(rows[0].scores), None)
    good = f"as good in {what}" if what else "as exact"
    error = next(iter(rows[0].errors), None)
    judged = f"; judged on predicted {error}, summed over the network" if error is not None else ""
    explained = f"{IN_FILES if by_files(rows) else IN_TOTAL}{judged}"
    notes = [explained, f"{MARK} no other plan that is as small is {good}"]
    mixed = [row for row in rows if row.allocator not in ("uniform", "float")]
    for who in dict.fromkeys(row.name for row in mixed):
        plans = [row for row in mixed if row.name == who]
        beaten = [row for row in plans if any(other.beats(row) for other in rows if other.allocator == "uniform")]
        if not beaten:
            continue
        notes.append(f"{len(beaten)} of {len(plans)} {who} plans are matched or beaten by a uniform plan no larger")
    untold = [row for row in rows if None in row.errors.values()]
    if not by_files(rows) and any(_of_file(row) for row in rows):
        notes.append(CODES_ALONE)
    if any(_of_file(row) for row in untold):
        notes.append("- for entropy-coded steps, which the table has no errors of")
    if not all(_of_file(row) for row in untold):
        notes.append(
            "- where the table cannot tell: channels of other widths were measured under one scale per tensor, or "
            "without errors per channel"
        )
    return notes


def _of_file(row: SweepRow) -> bool:
    """Whether its plan was made for a file's bytes."""
    return any(row.parameters.get(name) is not None for name in ("file_bits", "file_size"))


def sweep_csv(rows: Sequence[SweepRow], path: Path) -> None:
    """Write one line per row, every parameter a column; atomically."""
    write_csv([_flat(row) for row in rows], path)


def sweep_json(rows: Sequence[SweepRow], table: LayerTable) -> dict[str, Any]:
    """The rows for programs."""
    return {"scheme": str(table.scheme), "model": table.fingerprint, "rows": [vars(row) for row in rows]}


def row_label(row: SweepRow, varying: Mapping[str, Sequence[str]]) -> str:
    """`ptilmpq 0.5, 0.3`: the allocator and its values of the parameters that vary."""
    return f"{row.series} {asked_text(row)}" if row.series else f"{row.allocator} {values_text(row, varying)}".rstrip()


def asked_text(row: SweepRow) -> str:
    """What a row of a series was asked for: bits, or a QEM."""
    asked = next((row.parameters[name] for name in ASKED if isinstance(row.parameters.get(name), int | float)), "")
    return value_text(asked)


def values_text(row: SweepRow, varying: Mapping[str, Sequence[str]]) -> str:
    """`0.5, 0.3`: its values of the parameters that vary."""
    values = (row.parameters.get(name, "-") for name in varying.get(row.allocator, ()))
    return ", ".join(value_text(list(value) if isinstance(value, tuple) else value) for value in values)


def varying_parameters(rows: Sequence[SweepRow]) -> dict[str, list[str]]:
    """Allocator -> what differs from row to row of what it was told, less what only repeats an earlier one."""
    varying: dict[str, list[str]] = {}
    for allocator in dict.fromkeys(row.allocator for row in rows):
        made = [row.parameters for row in rows if row.allocator == allocator]
        names = dict.fromkeys(name for given in made for name in given)
        columns = {name: tuple(_text(given.get(name)) for given in made) for name in names}
        distinct = {column: name for name, column in reversed(columns.items()) if len(set(column)) > 1}
        varying[allocator] = [name for name in columns if name in distinct.values()]
    if "uniform" in varying:
        varying["uniform"] = ["bits"]  # its name, even of a single row
    return varying


def _flat(row: SweepRow) -> dict[str, Any]:
    return {
        **({"series": row.series} if row.series else {}),
        "allocator": row.allocator,
        "average_bits": row.average_bits,
        "total_average_bits": row.total_average_bits,
        "weights_only_bytes": row.weights_only_bytes,
        "total_bytes": row.total_bytes,
        **({"file_bytes": row.file_bytes, "file_bits": row.file_bits} if row.file_bytes is not None else {}),
        **{f"{name}_error": error for name, error in row.errors.items()},
        **{f"score_{name}": score for name, score in row.scores.items()},
        "pareto": int(row.pareto),
        **({"rounding": row.rounding} if row.rounding else {}),
        **{f"param_{name}": _text(value) for name, value in row.parameters.items()},
        **{f"found_{name}": _text(value) for name, value in row.found.items()},
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
