"""A table on disk: a safetensors file of its arrays, described in the header; read only if it holds together."""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from safetensors.numpy import save

from ..common.checks import first_problem, shown
from ..common.checksum import checksum_text, is_damaged, sealed, unsealed
from ..common.documents import LARGEST_DOCUMENT, Strict, parse_json
from ..common.files import atomic_path, open_regular
from ..errors import FormatError, MeasureWarning, SettingError
from .granular import INTEGER_BITS
from .layers import LayerDocument, check_once
from .scheme_names import NamedScheme
from .stats import METRICS, Array, CodedCurve, LayerStats, Measured
from .table_inputs import ERRORS, InputsDocument

TABLE_FORMAT, TYPES_FORMAT = "mpq-table", "mpq-types"
TABLE_VERSION = 5
WRITES = "`mpq measure SOURCE -o FILE` writes one"
LADDER = ("steps", "coded_bits", "coded_squared")
Table = TypeVar("Table", bound=Measured)
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda old: {**old, "version": 2},
    2: lambda old: {**old, "version": 3},
    3: lambda old: {**old, "version": 4},
    4: lambda old: {**old, "version": 5},
}
"""Version -> a function from that version's description, without its checksum, to the next one's. Version 1 had none,
and none of arrays. Version 2 did not say what a model takes beside the layers' weights. Version 3 had no ladder, and
version 4 no types, no full range and no 16-bit scales."""


def write(table: Measured, path: Path) -> None:
    """What LayerTable.save promises. Raises SettingError for a table that could not be read again."""
    lines = packed(table)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.writelines(lines)


def packed(table: Measured) -> "list[bytes | memoryview]":
    """The bytes of a table's file, in pieces. Raises SettingError for a table that could not be read again."""
    try:
        arrays, description = _pack(table)
    except ValidationError as error:
        raise SettingError(f"table: {first_problem(error)}") from error
    unsaid = {"inputs"} if description.inputs is None else None
    text = json.dumps(
        sealed(description.model_dump(mode="json", exclude=unsaid)), separators=(",", ":"), ensure_ascii=False
    )
    try:
        return list(in_order(save(arrays, {"format": TABLE_FORMAT, "table": text})))
    except UnicodeEncodeError as error:
        broken = text[error.start : error.end]
        raise SettingError(f"table: cannot hold {broken!r}, which is no character; rename what has it") from error


def read(path: Path, kind: type[Table]) -> Table:
    """What LayerTable.load promises."""
    try:
        with open_regular(path) as file:
            return unpacked(file, path, kind)
    except OSError as error:
        raise FormatError(f"{path}: not a readable table ({error.strerror}); {WRITES}") from error


def unpacked(file: BinaryIO, path: Path, kind: type[Table]) -> Table:
    """The table that a file holds from its beginning to its end; path: what names it in FormatError."""
    try:
        header = header_of(file)
        if is_header(header, TYPES_FORMAT):
            raise FormatError(
                f"{path}: a table of types, from which `mpq plan` plans; here a table of widths is wanted: "
                "measure one without --types"
            )
        if not is_header(header):
            raise FormatError(f"{path}: not a table; {WRITES}")
        description = _describe(path, header["__metadata__"].get("table", ""))
        arrays = _arrays(path, file, header, description)
    except ValueError as error:
        raise FormatError(f"{path}: not a readable table ({error}); {WRITES}") from error
    return _unpack(description, arrays, kind)


def is_table(path: Path) -> bool:
    """Whether the file is a table rather than weights; looks at the header only."""
    try:
        with open_regular(path) as file:
            return is_header(header_of(file))
    except (OSError, ValueError):
        return False


def header_of(file: BinaryIO) -> Any:
    """The header of a safetensors file, after which its data begin. Raises ValueError."""
    size = _size(file)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, LARGEST_DOCUMENT):
        raise ValueError(f"its header would have {length} bytes, and the file has {size}")
    return parse_json(file.read(length))


def _size(file: BinaryIO) -> int:
    """Bytes of the whole file; it is left where it is."""
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(place)
    return size


def is_header(header: Any, kind: str = TABLE_FORMAT) -> bool:
    """Whether the header is that of a file of this format."""
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(metadata, dict) and metadata.get("format") == kind


def in_order(data: bytes) -> Iterator[bytes | memoryview]:
    """A safetensors file with its header sorted, for the library writes metadata in any order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    yield memoryview(data)[end:]


class _Layer(LayerDocument):
    macs: Annotated[int, Field(ge=0)] | None
    tied: tuple[str, ...]
    digest: str


class _Description(Strict):
    """ladder: how many steps entropies are known at; checksums: of each array's bytes, in a table that has them.

    inputs: what is known of layers' inputs; left out where nothing is.
    """

    version: Literal[5]
    scheme: NamedScheme
    bits: Annotated[tuple[int, ...], Field(min_length=1)]
    metrics: Annotated[tuple[str, ...], Field(min_length=1)]
    channel_errors: bool
    sensitivities: tuple[str, ...] = ()
    channel_sensitivities: tuple[str, ...] = ()
    ladder: Annotated[int, Field(ge=0)] = 0
    fold_bn: bool
    fingerprint: str
    skipped: tuple[str, ...]
    left_alone: tuple[tuple[str, str], ...]
    weights: str | None = None
    rest_bytes: Annotated[int, Field(ge=0)] | None = None
    layers: tuple[_Layer, ...]
    inputs: InputsDocument | None = None
    checksums: Mapping[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        ascending = list(self.bits) == sorted(set(self.bits))
        if not ascending or not set(self.bits) <= set(INTEGER_BITS):
            raise ValueError(f"bits: {list(self.bits)} is not allowed; some of 1 to 8, ascending, each once")
        for name, listed in (("metrics", self.metrics), ("sensitivities", self.sensitivities),
                          ("channel_sensitivities", self.channel_sensitivities)):  # fmt: skip
            if len(set(listed)) < len(listed):
                raise ValueError(f"{name}: {list(listed)} has one twice")
        unknown = [metric for metric in self.metrics if metric not in METRICS]
        if unknown:
            raise ValueError(f"metrics: {shown(unknown[0])} is not allowed; {', '.join(METRICS)}")
        check_once(((layer.name, *layer.tied) for layer in self.layers), self.skipped)
        if self.inputs is not None:
            self.inputs.check_layers([layer.name for layer in self.layers])
        return self

    @property
    def channels(self) -> list[int]:
        """Output channels of each layer."""
        return [layer.channels for layer in self.layers]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The arrays that it describes."""
        layers, total = len(self.layers), sum(self.channels)
        widths, metrics = len(self.bits), len(self.metrics)
        shapes: dict[str, tuple[int, ...]] = {
            "importance": (layers,),
            "channel_importance": (total,),
            "errors": (layers, metrics, widths),
        }
        if self.channel_errors:
            shapes["channel_errors"] = (metrics, widths, total)
        if self.sensitivities:
            shapes["sensitivities"] = (layers, len(self.sensitivities), widths)
        if self.channel_sensitivities:
            shapes["channel_sensitivities"] = (len(self.channel_sensitivities), widths, total)
        if self.ladder:
            shapes |= dict.fromkeys(LADDER, (layers, self.ladder))
        if self.inputs is not None:
            shapes |= self.inputs.shapes
        return shapes


def _pack(table: Measured) -> tuple[dict[str, NDArray[Any]], _Description]:
    per_channel = bool(table.layers) and all(layer.channel_errors for layer in table.layers)
    arrays: dict[str, NDArray[Any]] = {
        "importance": np.array([layer.importance for layer in table.layers], np.float64),
        "channel_importance": np.concatenate([np.empty(0), *(layer.channel_importance for layer in table.layers)]),
        "errors": np.array([[layer.errors[m] for m in table.metrics] for layer in table.layers], np.float64),
    }
    if per_channel:
        per_layer = [np.stack([layer.channel_errors[m] for m in table.metrics]) for layer in table.layers]
        arrays["channel_errors"] = np.concatenate(per_layer, axis=2)
    if names := table.sensitivities:
        arrays["sensitivities"] = np.array([[layer.sensitivities[n] for n in names] for layer in table.layers])
    if names := table.channel_sensitivities:
        stacked = [np.stack([layer.channel_sensitivities[n] for n in names]) for layer in table.layers]
        arrays["channel_sensitivities"] = np.concatenate(stacked, axis=2)
    curves = [layer.coded for layer in table.layers if layer.coded is not None]
    ladder = len(curves[0].steps) if curves and len(curves) == len(table.layers) else 0
    if ladder:
        arrays["steps"] = np.stack([curve.steps for curve in curves])
        arrays["coded_bits"] = np.stack([curve.bits for curve in curves])
        arrays["coded_squared"] = np.stack([curve.squared_error for curve in curves])
    inputs = InputsDocument.of(table)
    if inputs is not None:
        arrays |= inputs.arrays(table)
    # safetensors writes an array's buffer as it lies in memory, whatever its strides say.
    arrays = {name: np.ascontiguousarray(array, np.float64) for name, array in arrays.items()}
    layers = tuple(
        _Layer(
            name=layer.name, kind=layer.kind, shape=layer.shape, channel_axis=layer.channel_axis,
            macs=layer.macs, tied=layer.tied, digest=layer.digest,
        )
        for layer in table.layers
    )  # fmt: skip
    description = _Description(
        version=5, ladder=ladder, scheme=table.scheme, bits=table.bits, metrics=table.metrics,
        channel_errors=per_channel, sensitivities=table.sensitivities,
        channel_sensitivities=table.channel_sensitivities, fold_bn=table.fold_bn, fingerprint=table.fingerprint,
        skipped=table.skipped, left_alone=table.left_alone, weights=table.weights,
        rest_bytes=table.rest_bytes, layers=layers, inputs=inputs,
        checksums={name: checksum_text(array.tobytes()) for name, array in arrays.items()},
    )  # fmt: skip
    return arrays, description


def _describe(path: Path, text: Any) -> _Description:
    try:
        document = parse_json(text)
        version = document["version"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: the table's description is damaged ({error}); measure again") from error
    if type(version) is not int or not 1 <= version <= TABLE_VERSION:
        raise FormatError(
            f"{path}: table version {version!r:.40}, and this mpq-plugins reads 1 to {TABLE_VERSION}; measure again"
        )
    if is_damaged(document) or (version > 1 and document == unsealed(document)):
        raise FormatError(f"{path}: the table's description is damaged, its checksum is another's; measure again")
    if version == 1:
        warnings.warn(MeasureWarning(
            f"{path}: is of a version that had no checksums, so damage to it cannot be seen; measure again to be sure"
        ), stacklevel=4)  # fmt: skip
    plain = unsealed(document)
    for step in range(version, TABLE_VERSION):
        plain = MIGRATIONS[step](plain)
    try:
        description = _Description.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        raise FormatError(f"{path}: {first_problem(error)}") from error
    if version > 1 and description.checksums.keys() != description.shapes.keys():
        raise FormatError(f"{path}: has checksums of other arrays than its own; measure again")
    return description


def _arrays(path: Path, file: BinaryIO, header: dict[str, Any], description: _Description) -> dict[str, Array]:
    """The arrays, if they are those that the description says, one after the other and nothing beside."""
    expected = description.shapes
    for name, shape in expected.items():
        got = header.get(name)
        if not isinstance(got, dict) or got.get("dtype") != "F64" or got.get("shape") != list(shape):
            described = f"{got.get('dtype')} {got.get('shape')}" if isinstance(got, dict) else "nothing"
            raise FormatError(f"{path}: array {name!r} should be F64 {list(shape)}, got {described:.80}; measure again")
    place, size = 0, _size(file) - file.tell()
    names = sorted(expected, key=lambda name: _ends(header[name]))
    for name in names:
        length = 8 * math.prod(expected[name])
        if header[name].get("data_offsets") != [place, place + length]:
            raise FormatError(f"{path}: array {name!r} does not lie where it should; measure again")
        place += length
    if place != size or header.keys() != {*expected, "__metadata__"}:
        raise FormatError(f"{path}: is cut short, or has more in it than its arrays; measure again")
    return {name: _array(path, file, name, expected[name], description) for name in names}


def _ends(entry: Any) -> tuple[int, ...]:
    """Where an array lies, to sort by; nowhere for what is no place."""
    offsets = entry.get("data_offsets")
    return tuple(offsets) if isinstance(offsets, list) and all(type(end) is int for end in offsets) else ()


def _array(path: Path, file: BinaryIO, name: str, shape: tuple[int, ...], description: _Description) -> Array:
    data = bytearray(file.read(8 * math.prod(shape)))
    if len(data) != 8 * math.prod(shape):
        raise FormatError(f"{path}: array {name!r} is cut short; the file changed while being read")
    if description.checksums and description.checksums[name] != checksum_text(data):
        raise FormatError(f"{path}: array {name!r} is damaged, its checksum is another's; measure again")
    array: Array = np.frombuffer(data, np.float64).reshape(shape)
    if problem := _problem(name, array, description):
        raise FormatError(f"{path}: array {name!r} {problem}; measure again")
    return array


def _problem(name: str, array: Array, description: _Description) -> str | None:
    """Why these are no measurements, in words."""
    if np.isnan(array).any():
        return "holds NaN"
    if name == "steps" and not ((array > 0).all() and (np.diff(array) > 0).all()):
        return "holds steps that do not ascend from above 0"
    if "sensitivities" in name:
        return "holds infinity" if np.isinf(array).any() else None
    if "errors" in name:  # a ratio in decibels may have any sign, and is infinite where nothing is lost
        axis = 0 if name == "channel_errors" else 1
        said = description.inputs if name == ERRORS else description
        metrics = said.metrics if said is not None else ()
        array = np.delete(array, [k for k, m in enumerate(metrics) if m == "sqnr_db"], axis)
    return "holds negative or infinite values, and none can be" if not ((array >= 0) & (array < np.inf)).all() else None


def _unpack(description: _Description, arrays: Mapping[str, NDArray[Any]], kind: type[Table]) -> Table:
    channels = description.channels
    cuts = np.cumsum(channels)[:-1]
    importances = np.split(arrays["channel_importance"], cuts)

    def split(array: str, names: Sequence[str]) -> dict[str, list[Array]]:
        return {name: np.split(arrays[array][k], cuts, axis=1) for k, name in enumerate(names)}

    channel_errors = split("channel_errors", description.metrics) if description.channel_errors else {}
    channel_sensitivities = split("channel_sensitivities", description.channel_sensitivities)
    inputs = description.inputs.stats(arrays) if description.inputs is not None else {}
    layers = tuple(
        LayerStats(
            name=layer.name, kind=layer.kind, shape=layer.shape, channel_axis=layer.channel_axis,
            importance=float(arrays["importance"][i]), channel_importance=importances[i],
            errors={metric: arrays["errors"][i, m] for m, metric in enumerate(description.metrics)},
            channel_errors={metric: parts[i] for metric, parts in channel_errors.items()},
            sensitivities={name: arrays["sensitivities"][i, k] for k, name in enumerate(description.sensitivities)},
            channel_sensitivities={name: parts[i] for name, parts in channel_sensitivities.items()},
            coded=CodedCurve(*(arrays[name][i] for name in LADDER)) if description.ladder else None,
            inputs=inputs.get(layer.name), macs=layer.macs, tied=layer.tied, digest=layer.digest,
        )
        for i, layer in enumerate(description.layers)
    )  # fmt: skip
    return kind(
        layers, description.scheme, description.bits, description.metrics, description.fold_bn,
        description.fingerprint, description.skipped, description.left_alone, description.weights,
        description.rest_bytes, *_said_of_inputs(description.inputs),
    )  # fmt: skip


def _said_of_inputs(inputs: InputsDocument | None) -> tuple[Any, ...]:
    """The last fields of a table."""
    return () if inputs is None else (inputs.activations, inputs.bits, inputs.live)
