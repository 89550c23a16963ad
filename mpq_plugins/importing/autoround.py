"""AutoRound's AutoScheme: a file for each scheme it tried, with the loss of each layer under that scheme alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.checks import path_of, shown
from ..common.text import first_few
from ..errors import FormatError, SettingError
from ..measurement.contract import Curves
from ..plans.affine import Affine
from ..plans.arguments import check_any_table
from ..plans.scheme import Scheme
from ..plans.table import LayerTable
from .documents import document_of, finite, mapping_in
from .filling import AnyTable, filled, layers_of, names_of, without

NAME = "autoround"
VERSION = 1
PATTERN = "scheme_*.json"
PER_TENSOR, PER_CHANNEL = 0, -1  # as AutoRound writes group sizes
PLAIN_TYPES = ("int", "int_sym", "int_asym")
FLOAT_BITS = 16


@dataclass(frozen=True)
class Grid:
    """What AutoRound and an affine scheme both say of codes."""

    bits: int
    group_size: int
    symmetric: bool

    def __str__(self) -> str:
        grain = {PER_TENSOR: "per tensor", PER_CHANNEL: "per channel"}.get(self.group_size, f"in {self.group_size}s")
        return f"{self.bits} bits {'symmetric' if self.symmetric else 'asymmetric'} {grain}"


@dataclass(frozen=True)
class Scores:
    """One file: the scheme, and the loss of each layer."""

    path: Path
    grid: Grid
    losses: Mapping[str, float]


def import_autoround(path: str | Path, table: AnyTable, *, skip: Sequence[str] = ()) -> AnyTable:
    """Add the sensitivity `autoround` to a table: the losses that AutoRound's AutoScheme worked out.

    Each width, or type, of the table needs a file whose scheme has the same bits, group size and symmetry. AutoRound's
    symmetric grid has all 2^b levels, as `Affine(symmetric="full")`; a table under `symmetric=True` takes it too.

    Args:
        path: A file `scheme_NN_HASH.json`, or the directory of several.
        table: The table, of widths under an affine scheme or of types.
        skip: Globs on layers that the result is without, such as those that have no score. What the model stores
            beside its layers is then not known.

    Returns:
        The table with the sensitivity.

    Raises:
        SettingError: No file is of one of the table's widths, or a layer has no score.
        FormatError: A file is no such file.

    Examples:
        >>> import json, mpq_plugins as mpq, torch
        >>> table = mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 2)), mpq.Affine(symmetric="full"), bits=(4,))
        >>> scheme = {"bits": 4, "group_size": 0, "sym": True, "data_type": "int"}
        >>> scores = {"version": 1, "scheme": scheme, "layer_scores": {"0": [72, 0.5]}}
        >>> with open("scheme_00_0a.json", "w") as file:
        ...     json.dump(scores, file)
        >>> mpq.import_autoround("scheme_00_0a.json", table).layers[0].sensitivities["autoround"].tolist()
        [0.5]
    """
    check_any_table(table)
    files = _read(path_of("path", path))
    table = without(table, skip)
    _check_names(files.values(), [names_of(layer) for layer in layers_of(table)])
    return filled(table, NAME, lambda one: _curves(one, files, Path(path)))


def is_autoround(document: Any) -> bool:
    """Whether a JSON document is of AutoScheme."""
    return isinstance(document, dict) and {"scheme", "layer_scores"} <= document.keys()


def _read(path: Path) -> dict[Grid, Scores]:
    """The files by what they are of. Raises FormatError, and SettingError where two are of the same."""
    paths = sorted(path.glob(PATTERN)) if path.is_dir() else [path]
    if not paths:
        raise FormatError(f"{path}: has no {PATTERN}; give the directory that AR_AUTO_SCHEME_CACHE named")
    found: dict[Grid, Scores] = {}
    for one in map(_scores, paths):
        first = found.setdefault(one.grid, one)
        if first is not one:
            raise SettingError(f"{first.path} and {one.path} are both of {one.grid}; leave one of them out")
    return found


def _scores(path: Path) -> Scores:
    document = document_of(path)
    if not is_autoround(document):
        raise FormatError(f"{path}: not a file of AutoScheme, which has 'scheme' and 'layer_scores'")
    if document.get("version") != VERSION:
        raise FormatError(f"{path}: version {document.get('version')!r:.40}; {VERSION} is read")
    scores = mapping_in(str(path), document, "layer_scores")
    return Scores(path, _grid(path, mapping_in(str(path), document, "scheme")), {
        name: _loss(f"{path}: layer {name!r}", entry) for name, entry in scores.items()
    })  # fmt: skip


def _loss(where: str, entry: Any) -> float:
    """The second of [total bits, loss]. Raises FormatError."""
    if not isinstance(entry, list) or len(entry) != 2:
        raise FormatError(f"{where}: {shown(entry)} is not [total bits, loss]")
    return finite(where, entry[1])


def _grid(path: Path, scheme: Mapping[str, Any]) -> Grid:
    """Of a scheme of integers that quantizes weights alone. Raises FormatError."""
    bits, size, symmetric = scheme.get("bits"), scheme.get("group_size"), scheme.get("sym")
    if type(bits) is not int or type(size) is not int or type(symmetric) is not bool:
        raise FormatError(f"{path}: scheme: bits, group_size and sym are {bits!r:.20}, {size!r:.20}, {symmetric!r:.20}")
    kind = scheme.get("data_type") or "int"
    if bits < FLOAT_BITS and (kind not in PLAIN_TYPES or scheme.get("super_bits") or scheme.get("super_group_size")):
        raise FormatError(
            f"{path}: scheme: of {kind!r:.40} with scales of scales, and integers with one scale are read"
        )
    inputs = scheme.get("act_bits")
    if type(inputs) is int and inputs < FLOAT_BITS:
        raise FormatError(
            f"{path}: scheme: quantizes inputs to {inputs} bits too, so its losses are not of weights alone; score a "
            "scheme of weights, as W4A16"
        )
    return Grid(bits, size, symmetric)


def _check_names(files: Any, layers: Sequence[tuple[str, ...]]) -> None:
    """Raise SettingError, naming them, for layers without a score."""
    for scores in files:
        missing = [names[0] for names in layers if not any(name in scores.losses for name in names)]
        if missing:
            skipped = " ".join(f"--skip '{name}'" for name in missing[:3])
            raise SettingError(
                f"{scores.path}: has no score of {first_few([repr(name) for name in missing], ', ')}. Score those too, "
                f"or leave them in floating point ({skipped}{' ...' if len(missing) > 3 else ''})"
            )


def _curves(table: LayerTable, files: Mapping[Grid, Scores], path: Path) -> dict[str, Curves]:
    wanted = [_of_table(table.scheme, bits) for bits in table.bits]
    missing = [str(grid) for grid in wanted if grid not in files]
    if missing:
        raise SettingError(
            f"{path}: has no scores of {first_few(missing, ', ')}, which the table has; it has those of "
            f"{first_few(list(map(str, files)), ', ')}. Score the others, or measure a table of these"
        )
    for layer in table.layers:
        if table.scheme_of(layer) != table.scheme:
            raise SettingError(
                f"layer {layer.name!r}: has {table.scheme_of(layer)} in the table, for its inputs do not divide into "
                f"{table.scheme.group_size}s, and AutoRound's scores are of those; skip it (--skip '{layer.name}')"
            )
    scores = [files[grid].losses for grid in wanted]
    return {
        layer.name: Curves(np.array([_of_layer(losses, names_of(layer)) for losses in scores]))
        for layer in table.layers
    }


def _of_layer(losses: Mapping[str, float], names: Sequence[str]) -> float:
    return next(losses[name] for name in names if name in losses)


def _of_table(scheme: Scheme, bits: int) -> Grid:
    """What AutoRound would call a table's scheme at a width. Raises SettingError for one that it has not."""
    if not isinstance(scheme, Affine):
        raise SettingError(f"table: was measured under {scheme}, and AutoRound's scores are of integers with scales")
    grains = {"per_tensor": PER_TENSOR, "per_channel": PER_CHANNEL}
    return Grid(bits, grains.get(scheme.granularity, scheme.group_size or 0), bool(scheme.symmetric))
