"""ModelOpt's auto_quantize: of each group of fused layers a score for each format that it tried."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..checkpoints.checkpoint import load_torch
from ..common.checks import path_of, shown
from ..common.text import first_few
from ..errors import FormatError, SettingError, SourceError
from ..measurement.contract import Curves
from ..plans.affine import Affine
from ..plans.arguments import check_any_table
from ..plans.granular import INTEGER_BITS
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from .documents import document_of, finite, mapping_in
from .filling import filled, names_of, without

NAME = "modelopt"
STATS = "candidate_stats"
REFUSED = "would execute code"  # as load_torch says it
SUFFIX = ".quant_recipe"  # of the names that its groups have
EFFECTIVE = re.compile(r"effective-bits:\s*([0-9]+(?:\.[0-9]+)?)")
SAID = re.compile(r"(?:^|_)(?:INT|W)([0-9]+)(?=_|A|$)")
FLOATING = re.compile(r"(?:^|_)(?:NV|MX)?FP[0-9]")
OF_INPUTS_TOO = re.compile(r"SMOOTHQUANT|INT8_DEFAULT|(?:^|_)W[0-9]+A(?!16(?:_|$))[0-9]+")
UNQUANTIZED = re.compile(r"NONE\b")


def import_modelopt(path: str | Path, table: LayerTable, *, skip: Sequence[str] = ()) -> LayerTable:
    """Add the sensitivity `modelopt` to a table: the scores that ModelOpt's `auto_quantize` worked out.

    ModelOpt scores groups of layers that are fused. A group's score is divided among its layers by their weights, so
    that it adds up where they agree in width, as `Budget(tie=("qkv", "gate_up"))` has them. Its formats say their bits;
    groups and scales are taken to be the table's.

    Args:
        path: The search's checkpoint: as torch saved it, if that holds nothing but numbers and texts, or as JSON.
        table: The table, of widths under an affine scheme.
        skip: Globs on layers that the result is without, such as those that have no score. What the model stores
            beside its layers is then not known.

    Returns:
        The table with the sensitivity.

    Raises:
        SettingError: A layer has no score, or no format of it has one of the table's widths.
        FormatError: The file is no such file.

    Examples:
        >>> import json, mpq_plugins as mpq, torch
        >>> table = mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 2)), bits=(4, 8))
        >>> scores = {"formats": ["INT4_CFG", "INT8_CFG"], "scores": [0.5, 0.125], "module_names": ["0"]}
        >>> with open("search.json", "w") as file:
        ...     json.dump({"candidate_stats": {"0.quant_recipe": scores}}, file)
        >>> mpq.import_modelopt("search.json", table).layers[0].sensitivities["modelopt"].tolist()
        [0.5, 0.125]
    """
    path = path_of("path", path)
    check_any_table(table)
    if not isinstance(table, LayerTable):
        raise SettingError(
            f"{path}: its formats say their bits and not which types they are; give a table of widths (mpq measure "
            "without --types)"
        )
    if not isinstance(table.scheme, Affine):
        raise SettingError(f"table: was measured under {table.scheme}, and ModelOpt's integers have scales; use affine")
    groups = mapping_in(str(path), _document(path), STATS)
    table = without(table, skip)
    return filled(table, NAME, lambda one: _curves(path, groups, one))


def is_modelopt(document: Any) -> bool:
    """Whether what a file holds is of auto_quantize."""
    return isinstance(document, dict) and STATS in document


def _document(path: Path) -> Any:
    """What the file holds, of which no code is run. Raises FormatError."""
    try:
        with path.open("rb") as file:
            binary = file.read(2) in (b"PK", b"\x80\x02")
    except OSError as error:
        raise FormatError(f"{path}: cannot read it ({error.strerror or error})") from error
    if not binary:
        return document_of(path)
    try:
        return load_torch(path)
    except SourceError as error:
        if REFUSED not in str(error):
            raise FormatError(str(error)) from error
        raise FormatError(
            f"{path}: holds objects other than numbers and texts, which are not read, for that could run code. Save "
            f"the scores as JSON where ModelOpt is: json.dump({{'{STATS}': stats}}, file, default=str)"
        ) from error


def _curves(path: Path, groups: Mapping[str, Any], table: LayerTable) -> dict[str, Curves]:
    by_name = {name: layer for layer in table.layers for name in names_of(layer)}
    curves: dict[str, Curves] = {}
    for group, stats in groups.items():
        where = f"{path}: group {group!r:.80}"
        named = _modules(where, group, stats)
        layers = [by_name[name] for name in named if name in by_name]
        if not layers:
            continue
        if len(layers) < len(named):
            lacking = first_few([repr(name) for name in named if name not in by_name], ", ")
            raise SettingError(f"{where}: is scored with {lacking}, which the table lacks; skip all of the group")
        curve = _curve(where, stats, table.bits)
        weights = sum(layer.numel for layer in layers)
        for layer in layers:
            if layer.name in curves:
                raise FormatError(f"{where}: layer {layer.name!r} has a score in another group too")
            curves[layer.name] = Curves(curve * (layer.numel / weights))
    _check_all(path, table.layers, curves)
    return curves


def _check_all(path: Path, layers: Sequence[LayerStats], curves: Mapping[str, Curves]) -> None:
    missing = [layer.name for layer in layers if layer.name not in curves]
    if missing:
        skipped = " ".join(f"--skip '{name}'" for name in missing[:3])
        raise SettingError(
            f"{path}: has no score of {first_few([repr(name) for name in missing], ', ')}. Score those too, or leave "
            f"them in floating point ({skipped}{' ...' if len(missing) > 3 else ''})"
        )


def _modules(where: str, group: str, stats: Any) -> list[str]:
    """The layers of a group. Raises FormatError."""
    named = stats.get("module_names") if isinstance(stats, dict) else None
    if named is None:
        return [group.removesuffix(SUFFIX)]
    if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
        raise FormatError(f"{where}: module_names is {shown(named)}; a list of layers")
    return named


def _curve(where: str, stats: Any, bits: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The scores at these widths. Raises SettingError for one that no format has, or that two have."""
    formats, scores = (stats.get(key) if isinstance(stats, dict) else None for key in ("formats", "scores"))
    if not isinstance(formats, list) or not isinstance(scores, list) or len(formats) != len(scores):
        raise FormatError(f"{where}: formats and scores are no lists of the same length")
    by_bits: dict[int, list[tuple[str, float]]] = {}
    for each, score in zip(formats, scores, strict=True):
        width = _bits(where, each)
        by_bits.setdefault(width, []).append((each, finite(f"{where}: scores", _plain(score))))
    for width in bits:
        if len(by_bits.get(width, ())) != 1:
            has = first_few([name for name, _ in by_bits.get(width, ())], ", ") or "no format"
            raise SettingError(
                f"{where}: {has} has {width} bits, a width of the table, which needs one; it has {formats!r:.200}. "
                "Measure a table of the widths it has, or keep one format of each width"
            )
    return np.array([by_bits[width][0][1] for width in bits])


def _plain(score: Any) -> Any:
    """A score as a number, where torch has it as a tensor of one."""
    return score.item() if isinstance(score, Tensor) and score.numel() == 1 else score


def _bits(where: str, name: Any) -> int:
    """The width of a format of integers; 0 for others. Raises FormatError for one that does not say it."""
    if not isinstance(name, str):
        raise FormatError(f"{where}: format {shown(name)} is no text")
    if FLOATING.search(name) or UNQUANTIZED.match(name):
        return 0  # no integers
    if OF_INPUTS_TOO.search(name):
        raise FormatError(
            f"{where}: format {shown(name)} quantizes inputs too, so its score is not what weights cost; measure "
            "formats of weights alone"
        )
    effective, said = EFFECTIVE.search(name), SAID.search(name)
    width = float(effective[1]) if effective else float(said[1]) if said else 0.0
    if not width:
        raise FormatError(f"{where}: format {shown(name)} does not say its bits, as INT4_CFG or effective-bits: 4.0 do")
    return int(width) if width in INTEGER_BITS else 0
