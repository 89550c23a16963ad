"""TypeTable: what layers lose as each of several types, one measured table a type; one file on disk."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from ..common.checks import first_problem, path_of
from ..common.documents import Strict
from ..common.files import atomic_path, open_regular
from ..common.public import public
from ..errors import FormatError, SettingError
from .scheme_names import NamedScheme
from .stats import LayerStats
from .table import LayerTable
from .table_file import TYPES_FORMAT, header_of, in_order, is_header, packed, unpacked
from .types import NamedType

BASE = "base"


@public
@dataclass(frozen=True, eq=False)
class TypeColumn:
    """One type, and what the layers lose that can have it.

    Attributes:
        type: The type.
        table: The layers that can have it, measured under its scheme at its width.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> table = mpq.measure_types(torch.nn.Sequential(torch.nn.Linear(64, 8)), ("mxfp4",))
        >>> list(table.column("mxfp4").by_name)
        ['0']
    """

    type: NamedType
    table: LayerTable

    @cached_property
    def by_name(self) -> Mapping[str, LayerStats]:
        """The layers that can have the type, by name."""
        return {layer.name: layer for layer in self.table.layers}


@public
@dataclass(frozen=True, eq=False)
class TypeTable:
    """What was measured of layers under several types.

    Attributes:
        base: All layers, as a table of their own: which there are, of which weights.
        columns: The types, with the layers that can have them.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 8))
        >>> table = mpq.measure_types(net, ("int4", "mxfp4"))
        >>> [kind.name for kind in table.types], table.types_for("1")
        (['int4', 'mxfp4'], ('int4',))
    """

    base: LayerTable
    columns: tuple[TypeColumn, ...]

    @property
    def types(self) -> tuple[NamedType, ...]:
        """The types."""
        return tuple(column.type for column in self.columns)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The errors that were measured, by name."""
        return self.base.metrics

    def types_for(self, layer: str) -> tuple[str, ...]:
        """List the types that a layer can have.

        Args:
            layer: Its name.

        Returns:
            Their names.
        """
        return tuple(column.type.name for column in self.columns if layer in column.by_name)

    def column(self, name: str) -> TypeColumn:
        """Look up a type that was measured.

        Args:
            name: Its name.

        Returns:
            The type and its table.

        Raises:
            SettingError: It was not measured.
        """
        for column in self.columns:
            if column.type.name == name:
                return column
        raise SettingError(
            f"type: {name!r} was not measured; this table has {', '.join(kind.name for kind in self.types)}"
        )

    def with_tables(self, base: LayerTable, tables: Mapping[str, LayerTable]) -> "TypeTable":
        """Make the same with other tables, as a sensitivity makes them.

        Args:
            base: All layers.
            tables: A table for each type by its name.

        Returns:
            The table.
        """
        columns = tuple(replace(column, table=tables[column.type.name]) for column in self.columns)
        return TypeTable(base, columns)

    def save(self, path: str | Path) -> None:
        """Write the table as one safetensors file that holds a table's file for each type; atomically.

        Args:
            path: The file to write.
        """
        parts = {BASE: self.base, **{f"type.{n}": column.table for n, column in enumerate(self.columns)}}
        arrays = {name: np.frombuffer(b"".join(packed(table)), np.uint8) for name, table in parts.items()}
        types = [_Type(name=kind.name, scheme=kind.scheme, bits=kind.bits) for kind in self.types]
        description = _Description(version=1, types=tuple(types))
        data = save(arrays, {"format": TYPES_FORMAT, "types": json.dumps(description.model_dump(mode="json"))})
        with atomic_path(path_of("path", path)) as temporary, temporary.open("wb") as file:
            file.writelines(in_order(data))

    @classmethod
    def load(cls, path: str | Path) -> "TypeTable":
        """Read a table.

        Args:
            path: The table's file.

        Returns:
            The table.

        Raises:
            FormatError: The file is no such table, damaged, or newer than this version.
        """
        path = path_of("path", path)
        try:
            with open_regular(path) as file:
                header = header_of(file)
                if not is_header(header, TYPES_FORMAT):
                    raise FormatError(f"{path}: not a table of types; `mpq measure --types` writes one")
                file.seek(0)
                parts = {name: bytes(part["data"]) for name, part in deserialize(file.read())}  # type: ignore[no-untyped-call]
        except (OSError, ValueError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise FormatError(f"{path}: not a readable table of types ({reason})") from error
        description = _described(path, header["__metadata__"].get("types", ""))
        expected = [BASE, *(f"type.{n}" for n in range(len(description.types)))]
        if sorted(parts) != sorted(expected):
            raise FormatError(f"{path}: holds other tables than it says; measure again")
        tables = [unpacked(BytesIO(parts[name]), path, LayerTable) for name in expected]
        kinds = [NamedType(kind.name, kind.scheme, kind.bits) for kind in description.types]
        made = cls(tables[0], tuple(map(TypeColumn, kinds, tables[1:])))
        _check(path, made)
        return made


class _Type(Strict):
    name: str
    scheme: NamedScheme
    bits: Annotated[int, Field(ge=1, le=8)]


class _Description(Strict):
    version: Literal[1]
    types: Annotated[tuple[_Type, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [kind.name for kind in self.types]
        if len(set(names)) < len(names):
            raise ValueError(f"types: {names} has one twice")
        return self


def is_type_table(path: Path) -> bool:
    """Whether the file is a table of types; looks at the header only."""
    try:
        with open_regular(path) as file:
            return is_header(header_of(file), TYPES_FORMAT)
    except (OSError, ValueError):
        return False


def _described(path: Path, text: str) -> _Description:
    try:
        return _Description.model_validate_json(text)
    except ValidationError as error:
        raise FormatError(f"{path}: {first_problem(error)}; measure again") from error


def _check(path: Path, table: TypeTable) -> None:
    """Refuse columns that are of other weights than the base, or of another type than they say."""
    base = {layer.name: layer for layer in table.base.layers}
    for column in table.columns:
        kind = column.type
        if (column.table.scheme, column.table.bits) != (kind.scheme, (kind.bits,)):
            raise FormatError(f"{path}: type {kind.name!r} was measured as another; measure again")
        for name, layer in column.by_name.items():
            of = base.get(name)
            if of is None or (of.shape, of.digest) != (layer.shape, layer.digest):
                raise FormatError(f"{path}: layer {name!r} of type {kind.name!r} is of other weights; measure again")
