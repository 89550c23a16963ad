"""Olive's mixed_precision_info: widths by layer, which is a plan."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError
from torch import nn

from ..allocation.make import plan_of
from ..common.checks import first_problem, path_of
from ..common.progress import Progress
from ..common.text import first_few
from ..errors import FormatError, MismatchError, SettingError
from ..measurement.measure import Means, run
from ..measurement.request import MeasureRequest
from ..plans.affine import Affine
from ..plans.layers import LayerChoice
from ..plans.plan import Plan
from ..plans.stats import LayerStats
from ..weights.find import find_weights
from ..weights.handles import Weight
from ..weights.roles import HEAD, in_role, read_config
from .documents import document_of

INFO, DEFAULT, OVERRIDES = "mixed_precision_info", "default", "overrides"
WRAPPERS = ("model_attributes", "config")  # where Olive's own files have it
KEYS = ("bits", "group_size", "symmetric")
PER_TENSOR, PER_CHANNEL = 0, -1
MEASURED = Affine(symmetric=True, granularity="per_channel")  # what is looked at is the weights' fingerprint


@dataclass(frozen=True)
class Olive:
    """What signs the plan; its widths are the file's."""

    name: ClassVar[str] = "olive"


@dataclass(frozen=True)
class _Given:
    """Widths by layer name, and that of layers that are not named; None: these stay in floating point."""

    overrides: Mapping[str, Mapping[str, Any]]
    default: Mapping[str, Any] | None


def import_olive(
    path: str | Path,
    source: nn.Module | str | Path,
    *,
    skip: Sequence[str] = (),
    weights: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Make a plan of the widths that Olive chose: its `mixed_precision_info`.

    Layers that `overrides` names have their widths there; every other linear layer has the default, if there is one.
    Embeddings and the output head stay in floating point unless they are named.

    Args:
        path: A JSON file with `mixed_precision_info`, or with what that holds.
        source: The model, or its checkpoint.
        skip: Globs on layers to leave in floating point, as in `measure`.
        weights: The key of the weights in a torch checkpoint, as in `measure`.
        progress: Called with a layer's name, weights done and weights in all.

    Returns:
        The plan.

    Raises:
        SettingError: A layer cannot have its width or groups.
        MismatchError: The file names a layer that the source lacks.
        FormatError: The file is no such file.
        SourceError: The source cannot be read.

    Examples:
        >>> import json, mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(8, 2))
        >>> four = {"bits": 4, "group_size": -1, "symmetric": True}
        >>> with open("olive.json", "w") as file:
        ...     json.dump({"default": four, "overrides": {"1": {"bits": 8}}}, file)
        >>> [layer.bits for layer in mpq.import_olive("olive.json", net).layers]
        [4, 8]
    """
    path = path_of("path", path)
    given = _given(path, document_of(path))
    found = list(find_weights(source, skip=skip, refuse=False, weights=weights))
    every = find_weights(source, refuse=False, weights=weights)
    _check_known(path, given, every)
    planned = _planned(given, found, source)
    if not planned:
        raise SettingError(f"{path}: gives no layer of the source a width; it has overrides or a default for none")
    request = MeasureRequest(
        MEASURED, (8,), ("mse",), only=[_exactly(list(planned))], fold_bn=False, weights=weights
    ).checked()  # fmt: skip
    table = run(source, request, Means(progress=progress))
    choices = [_choice(path, layer, planned[layer.name]) for layer in table.layers]
    return plan_of(table, Olive(), choices, {})


def is_olive(document: Any) -> bool:
    """Whether a JSON document is, or has, what Olive calls mixed_precision_info."""
    return _info(document) is not None


def _info(document: Any) -> dict[str, Any] | None:
    if not isinstance(document, dict):
        return None
    if isinstance(document.get(INFO), dict):
        return document[INFO]  # type: ignore[no-any-return]  # just seen
    if document.keys() <= {DEFAULT, OVERRIDES} and isinstance(document.get(OVERRIDES, document.get(DEFAULT)), dict):
        return document
    return next((info for key in WRAPPERS if (info := _info(document.get(key))) is not None), None)


def _given(path: Path, document: Any) -> _Given:
    info = _info(document)
    if info is None:
        raise FormatError(f"{path}: has no {INFO!r}, nor {DEFAULT!r} and {OVERRIDES!r} alone")
    others = info.keys() - {DEFAULT, OVERRIDES}
    overrides, default = info.get(OVERRIDES) or {}, info.get(DEFAULT) or {}
    if others or not isinstance(overrides, dict) or not isinstance(default, dict):
        raise FormatError(f"{path}: {INFO}: {sorted(others)!r:.80} is not read; {DEFAULT} and {OVERRIDES} are")
    for name, entry in {DEFAULT: default, **overrides}.items():
        _check_entry(f"{path}: {name!r:.80}", entry)
    return _Given({name: {**default, **entry} for name, entry in overrides.items()}, default or None)


def _check_entry(where: str, entry: Any) -> None:
    if not isinstance(entry, dict) or entry.keys() - set(KEYS):
        raise FormatError(f"{where}: {entry!r:.80} is not read; an object of {', '.join(KEYS)}")
    for key, value in entry.items():
        if type(value) is not (bool if key == "symmetric" else int):
            raise FormatError(f"{where}: {key}: {value!r:.40} is not allowed")


def _check_known(path: Path, given: _Given, weights: Any) -> None:
    known = {name for weight in weights for name in weight.names}
    unknown = [name for name in given.overrides if name not in known]
    if unknown:
        raise MismatchError(
            f"{path}: names {first_few([repr(name) for name in unknown], ', ')}, which the source lacks; it was made "
            f"for another model, whose layers are called otherwise than {first_few(sorted(known)[:2], ', ')}"
        )


def _planned(given: _Given, weights: Sequence[Weight], source: Any) -> dict[str, Mapping[str, Any]]:
    """What each layer that gets a width is given. Raises SettingError where two names of a weight differ."""
    config = (lambda: {}) if isinstance(source, nn.Module) else (lambda: read_config(Path(source)))
    heads = in_role(HEAD, weights, config)
    planned: dict[str, Mapping[str, Any]] = {}
    for weight in weights:
        own = [given.overrides[name] for name in weight.names if name in given.overrides]
        if any(entry != own[0] for entry in own):
            raise SettingError(f"layer {weight.name!r}: is one weight with {weight.tied}, and their widths differ")
        if own:
            planned[weight.name] = own[0]
        elif given.default is not None and weight.kind == "linear" and weight.name not in heads:
            planned[weight.name] = given.default
    return planned


def _exactly(names: Sequence[str]) -> str:
    """A pattern of these layers' names and of no other."""
    return f"re:(?:{'|'.join(map(re.escape, names))})$"


def _choice(path: Path, layer: LayerStats, entry: Mapping[str, Any]) -> LayerChoice:
    where = f"{path}: layer {layer.name!r}"
    lacking = [key for key in KEYS if key not in entry]
    if lacking:
        raise FormatError(f"{where}: has no {', '.join(lacking)}, and neither has the default")
    try:
        return LayerChoice(
            name=layer.name, kind=layer.kind, shape=layer.shape, channel_axis=layer.channel_axis, numel=layer.numel,
            bits=entry["bits"], scheme=_scheme(entry), tied=layer.tied,
        )  # fmt: skip
    except ValidationError as error:
        raise SettingError(f"{where}: {first_problem(error)}") from error
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from error


def _scheme(entry: Mapping[str, Any]) -> Affine:
    """Raises SettingError for a group size there is not."""
    size, symmetric = entry["group_size"], entry["symmetric"]
    if size in (PER_TENSOR, PER_CHANNEL):
        return Affine(symmetric=symmetric, granularity="per_tensor" if size == PER_TENSOR else "per_channel")
    return Affine(symmetric=symmetric, granularity="per_group", group_size=size)
