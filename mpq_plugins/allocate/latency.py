"""A latency table: what each layer costs at each bit-width on the device it is for, in whatever unit it was timed."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError, SettingError

EXAMPLE = '{"conv1": {"4": 0.12, "8": 0.2}, ...}'


@dataclass(frozen=True)
class LatencyTable:
    """Layer name -> bit-width -> cost. Channels of a layer are taken to cost an equal share of it each."""

    entries: tuple[tuple[str, tuple[tuple[int, float], ...]], ...]

    @classmethod
    def of(cls, layers: "LatencyTable | str | Path | Mapping[str, Mapping[Any, float]]") -> "LatencyTable":
        """From a mapping, or from a JSON file of one. Raises FormatError (file) or SettingError naming the value."""
        if isinstance(layers, LatencyTable):
            return layers
        if isinstance(layers, str | Path):
            read = _read(Path(layers))
            if not isinstance(read, dict):
                raise FormatError(f"{layers}: holds a {type(read).__name__}; write {EXAMPLE}")
            return cls.of(read)
        if not isinstance(layers, Mapping) or not layers:
            raise SettingError(f"latency: {layers!r:.60} is no table; write {EXAMPLE}")
        return cls(tuple((str(name), _widths(str(name), own)) for name, own in layers.items()))

    def curve(self, layer: str, bits: Sequence[int]) -> list[float]:
        """The layer's cost at each bit-width. Raises SettingError for one that was not timed."""
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


def _widths(layer: str, own: Any) -> tuple[tuple[int, float], ...]:
    try:
        found = tuple((int(str(bits)), float(cost)) for bits, cost in own.items())
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise SettingError(f"latency: {layer!r}: {own!r:.60} is no table of bits and costs; write {EXAMPLE}") from error
    if not found or len({bits for bits, _ in found}) < len(found):
        raise SettingError(f"latency: {layer!r}: {own!r:.60} has no width, or one twice; write {EXAMPLE}")
    if any(isinstance(cost, bool | str) for cost in own.values()):
        raise SettingError(f"latency: {layer!r}: {own!r:.60} has a cost that is no number; write {EXAMPLE}")
    for bits, cost in found:
        if not 0 <= cost < math.inf:
            raise SettingError(f"latency: {layer!r} at {bits} bits: {cost!r} is not allowed; a number from 0 up")
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _once(path, pairs))
    except OSError as error:
        raise FormatError(f"{path}: cannot read it ({error.strerror}). Give a JSON file as {EXAMPLE}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON ({error}); write {EXAMPLE}") from error


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise FormatError(f"{path}: {', '.join(name for name, _ in pairs)}: a name is there twice; give each once")
    return found
