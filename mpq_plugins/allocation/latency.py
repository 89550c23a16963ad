"""A latency table: what each layer costs at each bit-width on the device it is for, in whatever unit it was timed."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.checks import is_number, shown
from ..common.documents import load_json
from ..common.public import public
from ..errors import FormatError, SettingError
from ..plans.granular import FLOAT_BITS, INTEGER_BITS

EXAMPLE = '{"conv1": {"4": 0.12, "8": 0.2}, ...}'
WIDTHS: tuple[int, ...] = (*INTEGER_BITS, *FLOAT_BITS)
LARGEST_COST = 1e300  # so that those of all layers can be added up


@public
@dataclass(frozen=True)
class LatencyTable:
    """Layer name -> bit-width -> cost. Channels of a layer are taken to cost an equal share of it each.

    Attributes:
        entries: (layer, ((bits, cost), ...)) pairs, in the unit of whoever timed them.

    Examples:
        >>> import mpq_plugins as mpq
        >>> mpq.LatencyTable.of({"fc": {4: 1.0, 8: 1.5}}).curve("fc", (8, 4))
        [1.5, 1.0]
    """

    entries: tuple[tuple[str, tuple[tuple[int, float], ...]], ...]

    @classmethod
    def of(cls, layers: "LatencyTable | str | Path | Mapping[str, Mapping[Any, float]]") -> "LatencyTable":
        """Make a table from a mapping, or from a JSON file of one.

        Args:
            layers: Layer -> bits -> cost, a file's path, or a table, which is given back.

        Returns:
            The table.

        Raises:
            FormatError: The file is no such mapping.
            SettingError: A layer, width or cost is not allowed. The message names it.
        """
        if isinstance(layers, LatencyTable):
            return layers
        if isinstance(layers, str | Path):
            read = _read(Path(layers))
            if not isinstance(read, dict):
                raise FormatError(f"{layers}: holds a {type(read).__name__}; write {EXAMPLE}")
            return cls.of(read)
        if not isinstance(layers, Mapping) or not layers:
            raise SettingError(f"latency: {shown(layers)} is no table; write {EXAMPLE}")
        return cls(tuple((str(name), _widths(str(name), costs)) for name, costs in layers.items()))

    def curve(self, layer: str, bits: Sequence[int]) -> list[float]:
        """Look up the layer's cost at each bit-width.

        Args:
            layer: Its name.
            bits: The widths.

        Returns:
            A cost for each width, in their order.

        Raises:
            SettingError: The layer was not timed at one of them.
        """
        known = dict(dict(self.entries).get(layer, ()))
        missing = [b for b in bits if b not in known]
        if missing:
            has = ", ".join(map(str, known)) or "no bit-width"
            raise SettingError(
                f"latency: {layer!r} has {has}, and not {', '.join(map(str, missing))}; time it, or leave that width "
                "out of bits and pins"
            )
        return [known[b] for b in bits]

    def __str__(self) -> str:
        digest = hashlib.sha256(repr(self.entries).encode()).hexdigest()
        return f"{len(self.entries)} layers, sha256:{digest[:16]}"


def _widths(layer: str, costs: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(costs, Mapping) or not costs:
        raise SettingError(f"latency: {layer!r}: {shown(costs)} is no table of bits and costs; write {EXAMPLE}")
    pairs = tuple((_width(layer, bits), _cost(layer, bits, cost)) for bits, cost in costs.items())
    if len({bits for bits, _ in pairs}) < len(pairs):
        raise SettingError(f"latency: {layer!r}: {shown(costs)} has a width twice; write {EXAMPLE}")
    return pairs


def _width(layer: str, bits: Any) -> int:
    """A width that a plan can have: an integer, or its text as JSON has it."""
    for known in WIDTHS:
        if bits == str(known) or (is_number(bits) and bits == known):
            return known
    raise SettingError(f"latency: {layer!r}: {shown(bits)} bits are not allowed; 1 to 8, or 16 or 32")


def _cost(layer: str, bits: Any, cost: Any) -> float:
    if not is_number(cost) or not 0 <= cost <= LARGEST_COST:
        raise SettingError(f"latency: {layer!r} at {bits} bits: {shown(cost)} is not allowed; a number from 0 up")
    return float(cost)


def _read(path: Path) -> Any:
    try:
        return load_json(path)
    except OSError as error:
        raise FormatError(f"{path}: cannot read it ({error.strerror}). Give a JSON file as {EXAMPLE}") from error
    except ValueError as error:
        raise FormatError(f"{path}: not JSON ({error}); write {EXAMPLE}") from error
