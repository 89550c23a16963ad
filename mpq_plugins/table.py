"""LayerTable: plain numbers per layer, measured once and reused by every allocator; one file on disk."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .errors import FormatError, SettingError
from .files import atomic_path
from .scheme import NamedScheme, Scheme
from .validation import first_problem

TABLE_FORMAT = "mpq-table"
TABLE_VERSION = 1

METRICS = ("relative", "mse", "rmse", "sqnr_db", "max_abs")

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)  # arrays have no single truth value; a layer is itself
class LayerStats:
    """One layer's numbers.

    shape: the weight's; channels: output channels; macs: multiply-accumulates for the example input, where
    one was given; importance: F_l = sum |w|; channel_importance: F_c = ||w_c||_2, (channels,); errors:
    metric -> (bit-widths,), in the order of the table's `bits`; channel_errors: metric -> (bit-widths, channels),
    empty unless asked for; sensitivities: name -> (bit-widths,), what quantizing the whole layer is predicted to
    cost, in the sensitivity's own unit, so that layers add up; channel_sensitivities: the same of each output channel,
    (bit-widths, channels), for those that can tell; tied: other names of the same weight; digest: see
    fingerprint.layer_digest.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    channel_axis: int
    importance: float
    channel_importance: Array
    errors: Mapping[str, Array]
    channel_errors: Mapping[str, Array] = field(default_factory=dict)
    sensitivities: Mapping[str, Array] = field(default_factory=dict)
    channel_sensitivities: Mapping[str, Array] = field(default_factory=dict)
    macs: int | None = None
    tied: tuple[str, ...] = ()
    digest: str = ""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.shape[self.channel_axis]


@dataclass(frozen=True, eq=False)
class LayerTable:
    """What was measured, on which weights, under which scheme."""

    layers: tuple[LayerStats, ...]
    scheme: Scheme
    bits: tuple[int, ...]
    metrics: tuple[str, ...]
    fold_bn: bool
    fingerprint: str
    skipped: tuple[str, ...] = ()
    left_alone: tuple[tuple[str, str], ...] = ()
    weights: str | None = None  # the key of those in a torch checkpoint (see weights.Weights.key)

    @property
    def sensitivities(self) -> tuple[str, ...]:
        """Names of the sensitivities that every layer has."""
        return tuple(self.layers[0].sensitivities) if self.layers else ()

    @property
    def channel_sensitivities(self) -> tuple[str, ...]:
        """Names of those that every layer has for each of its channels."""
        return tuple(self.layers[0].channel_sensitivities) if self.layers else ()

    def error(self, layer: LayerStats, metric: str, bits: int) -> float:
        """The error of a layer at a bit-width. Raises SettingError where it was not measured."""
        return float(layer.errors[self._check_metric(metric)][self.position(bits)])

    def errors(self, metric: str, bits: Sequence[int]) -> Array:
        """The errors of all layers at several bit-widths, (layers, len(bits)). Raises SettingError as `error`."""
        name, columns = self._check_metric(metric), [self.position(b) for b in bits]
        return np.array([layer.errors[name] for layer in self.layers])[:, columns]

    def channel_error(self, layer: LayerStats, metric: str, bits: int) -> Array:
        """The error of each output channel, (channels,). Raises SettingError where it was not measured."""
        if self._check_metric(metric) not in layer.channel_errors:
            raise SettingError(f"layer {layer.name!r}: no errors per channel in this table; measure(per_channel=True)")
        errors: Array = layer.channel_errors[metric][self.position(bits)]
        return errors

    def covers(self, bits: Sequence[int], metrics: Sequence[str], channel_errors: bool) -> bool:
        """Whether every number asked for is here."""
        return (
            set(bits) <= set(self.bits)
            and set(metrics) <= set(self.metrics)
            and (not channel_errors or all(layer.channel_errors for layer in self.layers))
        )

    def save(self, path: str | Path) -> None:
        """Write the table as one safetensors file with its description in the header; atomically.

        The same table gives the same bytes.
        """
        from safetensors.numpy import save

        arrays, description = _pack(self)
        with atomic_path(Path(path)) as temporary:
            # safetensors writes an array's buffer as it lies in memory, whatever its strides say.
            packed = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            data = save(packed, {"format": TABLE_FORMAT, "table": _text(description)})
            with temporary.open("wb") as file:
                file.writelines(_in_order(data))

    @classmethod
    def load(cls, path: str | Path) -> "LayerTable":
        """Read a table. Raises FormatError naming file, field and value."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                names = sorted(file.keys()) if metadata.get("format") == TABLE_FORMAT else []
                arrays = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path}: not a readable table ({error})") from error
        if metadata.get("format") != TABLE_FORMAT:
            raise FormatError(f"{path}: not a table; `mpq measure` writes one")
        return _unpack(path, _describe(path, metadata.get("table", "")), arrays)

    def _check_metric(self, metric: str) -> str:
        if metric not in self.metrics:
            raise SettingError(f"metric: {metric!r} was not measured; this table has {', '.join(self.metrics)}")
        return metric

    def position(self, bits: int) -> int:
        """Where a bit-width stands among those measured. Raises SettingError."""
        if bits not in self.bits:
            raise SettingError(f"bits: {bits} was not measured; this table has {', '.join(map(str, self.bits))}")
        return self.bits.index(bits)


def is_table(path: Path) -> bool:
    """Whether the file is a table rather than weights; looks at the header only."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(path.stat().st_size, 1 << 27):
                return False
            header: Any = json.loads(file.read(length))
            return bool(header.get("__metadata__", {}).get("format") == TABLE_FORMAT)
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _in_order(data: bytes) -> Iterator[bytes | memoryview]:
    """A safetensors file with its header sorted, for the library writes metadata in any order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    yield memoryview(data)[end:]


class _Layer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    kind: str
    shape: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    channel_axis: Annotated[int, Field(ge=0, le=1)]
    macs: int | None
    tied: tuple[str, ...]
    digest: str


class _Description(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    version: int
    scheme: NamedScheme
    bits: tuple[int, ...]
    metrics: tuple[str, ...]
    channel_errors: bool
    sensitivities: tuple[str, ...] = ()
    channel_sensitivities: tuple[str, ...] = ()
    fold_bn: bool
    fingerprint: str
    skipped: tuple[str, ...]
    left_alone: tuple[tuple[str, str], ...]
    weights: str | None = None
    layers: tuple[_Layer, ...]


def _pack(table: LayerTable) -> tuple[dict[str, NDArray[Any]], _Description]:
    per_channel = bool(table.layers) and all(layer.channel_errors for layer in table.layers)
    arrays: dict[str, NDArray[Any]] = {
        "importance": np.array([layer.importance for layer in table.layers], np.float64),
        "channel_importance": np.concatenate([layer.channel_importance for layer in table.layers]),
        "errors": np.array([[layer.errors[m] for m in table.metrics] for layer in table.layers], np.float64),
    }
    if per_channel:
        per_layer = [np.stack([layer.channel_errors[m] for m in table.metrics]) for layer in table.layers]
        arrays["channel_errors"] = np.concatenate(per_layer, axis=2)
    if names := table.sensitivities:
        arrays["sensitivities"] = np.array([[layer.sensitivities[n] for n in names] for layer in table.layers])
    if names := table.channel_sensitivities:
        own = [np.stack([layer.channel_sensitivities[n] for n in names]) for layer in table.layers]
        arrays["channel_sensitivities"] = np.concatenate(own, axis=2)
    layers = tuple(
        _Layer(
            name=layer.name, kind=layer.kind, shape=layer.shape, channel_axis=layer.channel_axis,
            macs=layer.macs, tied=layer.tied, digest=layer.digest,
        )
        for layer in table.layers
    )  # fmt: skip
    description = _Description(
        version=TABLE_VERSION, scheme=table.scheme, bits=table.bits, metrics=table.metrics,
        channel_errors=per_channel, sensitivities=table.sensitivities,
        channel_sensitivities=table.channel_sensitivities, fold_bn=table.fold_bn, fingerprint=table.fingerprint,
        skipped=table.skipped, left_alone=table.left_alone, weights=table.weights,
        layers=layers,
    )  # fmt: skip
    return arrays, description


def _text(description: _Description) -> str:
    """As JSON; as tables were before there was a key, where there is none."""
    return description.model_dump_json(exclude={"weights"} if description.weights is None else None)


def _describe(path: Path, text: str) -> _Description:
    try:
        version = json.loads(text)["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{path}: the table's description is damaged ({error!r}); measure again") from error
    if version != TABLE_VERSION:
        raise FormatError(
            f"{path}: table version {version!r}, and this mpq-plugins reads {TABLE_VERSION}; measure again"
        )
    try:
        return TypeAdapter(_Description).validate_json(text)
    except ValidationError as error:
        raise FormatError(f"{path}: {first_problem(error)}") from error


def _unpack(path: Path, description: _Description, arrays: Mapping[str, NDArray[Any]]) -> LayerTable:
    names = [layer.name for layer in description.layers]
    if len(set(names)) < len(names) or any(layer.channel_axis >= len(layer.shape) for layer in description.layers):
        raise FormatError(f"{path}: a layer appears twice, or has a channel axis outside its shape; measure again")
    channels = [layer.shape[layer.channel_axis] for layer in description.layers]
    total, widths, metrics = sum(channels), len(description.bits), len(description.metrics)
    expected = {
        "importance": (len(channels),),
        "channel_importance": (total,),
        "errors": (len(channels), metrics, widths),
    }
    if description.channel_errors:
        expected["channel_errors"] = (metrics, widths, total)
    if description.sensitivities:
        expected["sensitivities"] = (len(channels), len(description.sensitivities), widths)
    if description.channel_sensitivities:
        expected["channel_sensitivities"] = (len(description.channel_sensitivities), widths, total)
    for name, shape in expected.items():
        got = arrays.get(name)
        if got is None or got.shape != shape or got.dtype != np.float64 or np.isnan(got).any():
            found = "nothing" if got is None else f"{got.dtype} {got.shape}{' with NaN' if np.isnan(got).any() else ''}"
            raise FormatError(f"{path}: array {name!r} should be float64 {shape}, got {found}; measure again")
    cuts = np.cumsum(channels)[:-1]
    importances = np.split(arrays["channel_importance"], cuts)

    def split(array: str, names: Sequence[str]) -> dict[str, list[Array]]:
        return {name: np.split(arrays[array][k], cuts, axis=1) for k, name in enumerate(names)}

    channel_errors = split("channel_errors", description.metrics) if description.channel_errors else {}
    channel_sensitivities = split("channel_sensitivities", description.channel_sensitivities)
    layers = tuple(
        LayerStats(
            name=layer.name, kind=layer.kind, shape=layer.shape, channel_axis=layer.channel_axis,
            importance=float(arrays["importance"][i]), channel_importance=importances[i],
            errors={metric: arrays["errors"][i, m] for m, metric in enumerate(description.metrics)},
            channel_errors={metric: parts[i] for metric, parts in channel_errors.items()},
            sensitivities={name: arrays["sensitivities"][i, k] for k, name in enumerate(description.sensitivities)},
            channel_sensitivities={name: parts[i] for name, parts in channel_sensitivities.items()},
            macs=layer.macs, tied=layer.tied, digest=layer.digest,
        )
        for i, layer in enumerate(description.layers)
    )  # fmt: skip
    return LayerTable(
        layers, description.scheme, description.bits, description.metrics, description.fold_bn,
        description.fingerprint, description.skipped, description.left_alone, description.weights,
    )  # fmt: skip


def with_macs(table: LayerTable, macs: Mapping[str, int]) -> LayerTable:
    """The table with multiply-accumulates filled in by module name; tied layers' are added up.

    A look-up has 0; any other layer that was not seen at work keeps None, for it may work outside its module.
    """

    def count(layer: LayerStats) -> int | None:
        seen = [macs[name] for name in (layer.name, *layer.tied) if name in macs]
        return sum(seen) if seen or layer.kind == "embedding" else None

    return replace(table, layers=tuple(replace(layer, macs=count(layer)) for layer in table.layers))
