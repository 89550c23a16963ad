"""Plan: bits per layer, or per group of output channels, as versioned JSON that several backends consume."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from .errors import FormatError, SettingError
from .files import write_text
from .scheme import FLOAT_BITS, INTEGER_BITS, NamedScheme
from .validation import first_problem

if TYPE_CHECKING:
    from .size import PlanSize

PLAN_FORMAT = "mpq-plan"
PLAN_VERSION = 1
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Version -> a function from that version's document to the next one's."""

LARGEST_SIDE, LARGEST_SHAPE = 1 << 40, 1 << 62
DEEPEST = 32  # of parameters in one another
MOST_CHANNELS = 1 << 24  # no layer has more; a run of billions would only fill the memory
ALLOWED_BITS = (*INTEGER_BITS, *FLOAT_BITS)


def _parse_channels(value: object) -> object:
    """'0-2,5' -> (0, 1, 2, 5)."""
    if not isinstance(value, str):
        return value
    channels: list[int] = []
    for run in value.split(","):
        first, dash, last = run.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) >= MOST_CHANNELS:
            raise ValueError(f"{run[:40]!r} is no channel or run of channels below {MOST_CHANNELS}; write '0-2,5'")
        own = range(int(first), int(last if dash else first) + 1)
        if len(channels) + len(own) > MOST_CHANNELS:
            raise ValueError(f"more than {MOST_CHANNELS} channels; no layer has so many")
        channels.extend(own)
    return tuple(channels)


def _format_channels(channels: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> '0-2,5'."""
    runs: list[list[int]] = []
    for channel in channels:
        if runs and channel == runs[-1][1] + 1:
            runs[-1][1] = channel
        else:
            runs.append([channel, channel])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _check_plan_bits(bits: int) -> int:
    if bits not in ALLOWED_BITS:
        raise ValueError(f"{bits} is not allowed; 1 to 8, or 16 or 32 for floating point")
    return bits


Bits = Annotated[
    int,
    Field(strict=True, json_schema_extra={"enum": list(ALLOWED_BITS)}),
    BeforeValidator(lambda bits: _check_plan_bits(bits) if type(bits) is int else bits),
]
Channels = Annotated[
    tuple[int, ...],
    BeforeValidator(_parse_channels, json_schema_input_type=str),
    PlainSerializer(_format_channels, return_type=str),
    Field(json_schema_extra={"pattern": r"^\d+(-\d+)?(,\d+(-\d+)?)*$"}),
]


def beyond_memory(shape: Sequence[int]) -> bool:
    """Whether no memory holds a tensor of these sides, those of 0 left out."""
    return math.prod(side for side in shape if side) > LARGEST_SHAPE


def _check_depth(value: Any, most: int = DEEPEST) -> Any:
    """Refuse what is nested so deeply that it could be read but not written again."""
    if not most:
        raise ValueError(f"nested more than {DEEPEST} deep")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _check_depth(inner, most - 1)
    return value


class Part(BaseModel):
    """Output channels that share a bit-width. Channels ascend; 1..8 bits, or 16 or 32 for floating point."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Bits
    channels: Channels


class LayerChoice(BaseModel):
    """What one layer gets: either `bits` for all of it or `parts` that cover its output channels once each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str
    shape: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    channel_axis: Annotated[int, Field(ge=0)]
    numel: Annotated[int, Field(ge=0)]
    bits: Bits | None = None
    parts: tuple[Part, ...] | None = None
    scheme: NamedScheme
    tied: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        where = f"layer {self.name!r}"
        if max(self.shape) > LARGEST_SIDE or beyond_memory(self.shape):
            raise ValueError(f"{where}: shape {self.shape} is beyond any memory")
        if math.prod(self.shape) != self.numel or self.channel_axis >= len(self.shape):
            raise ValueError(
                f"{where}: numel {self.numel} and channel_axis {self.channel_axis} do not fit shape {self.shape}"
            )
        if self.channels > MOST_CHANNELS:
            raise ValueError(f"{where}: {self.channels} output channels; {MOST_CHANNELS} is the most")
        if (self.bits is None) == (self.parts is None):
            raise ValueError(f"{where}: give either bits or parts")
        if self.parts is not None:
            listed = [channel for part in self.parts for channel in part.channels]
            ascending = all(list(part.channels) == sorted(part.channels) for part in self.parts)
            if sorted(listed) != list(range(self.channels)) or not ascending or not all(p.channels for p in self.parts):
                raise ValueError(
                    f"{where}: parts must cover channels 0 to {self.channels - 1} once each, ascending, none empty"
                )
        for bits, channels in self.widths:
            if bits not in FLOAT_BITS:
                self.scheme.check_bits(bits, f"{where}: bits")
                self.scheme.check_part(bits, self.shape, self.channel_axis, channels, self.name)
        self.scheme.regions_per_channel(self.shape, self.channel_axis, self.name)
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, then its tied ones."""
        return (self.name, *self.tied)

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.shape[self.channel_axis]

    @property
    def groups(self) -> tuple[Part, ...]:
        """The parts, a layer without parts being one."""
        if self.parts is not None:
            return self.parts
        assert self.bits is not None
        return (Part(bits=self.bits, channels=tuple(range(self.channels))),)

    @property
    def in_float(self) -> bool:
        """Whether all of the layer stays in floating point."""
        return all(part.bits in FLOAT_BITS for part in self.groups)

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """Bits, and how many channels have them."""
        if self.bits is not None:
            return ((self.bits, self.channels),)
        return tuple((part.bits, len(part.channels)) for part in self.groups)

    @property
    def bits_text(self) -> str:
        """`5`, or `3x12 8x4` for parts: bits x channels."""
        return str(self.bits) if self.bits is not None else " ".join(f"{bits}x{count}" for bits, count in self.widths)

    @property
    def code_bits(self) -> int:
        """Bits of all codes together."""
        if self.bits is not None:
            return self.numel * self.bits
        per_channel = self.numel // max(1, self.channels)
        return sum(part.bits * len(part.channels) * per_channel for part in self.groups)


class AllocatorRecord(BaseModel):
    """Which allocator made the plan, with which parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    parameters: Annotated[dict[str, Any], AfterValidator(_check_depth)]


class Plan(BaseModel):
    """Bits for every quantizable layer of one model.

    activation_bits: for all layers' inputs, or None for floating point. model: fingerprint of the weights the
    plan was made for. fold_bn: whether BatchNorm was folded when they were measured. skipped: quantizable
    layers left in floating point on request, or by default. weights: of a torch checkpoint with several sets of
    weights, the key of those it was made from, None where nothing had to be said. left_alone: parameters that a bare
    file's reader could take for layers' weights, and that are none. made_with: versions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["mpq-plan"] = "mpq-plan"
    version: Literal[1] = 1
    made_with: dict[str, str]
    allocator: AllocatorRecord
    model: str
    fold_bn: bool
    activation_bits: Annotated[int, Field(ge=1, le=16)] | None = None
    skipped: tuple[str, ...] = ()
    weights: str | None = None
    left_alone: tuple[str, ...] = ()
    layers: tuple[LayerChoice, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        seen: set[str] = set()
        for name in (name for layer in self.layers for name in layer.names):
            if name in seen:
                raise ValueError(f"layers: {name!r} appears more than once")
            seen.add(name)
        return self

    @cached_property
    def by_name(self) -> Mapping[str, LayerChoice]:
        """The layers by name."""
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def by_any_name(self) -> Mapping[str, LayerChoice]:
        """The layers by name and by the tied names of their weights."""
        return {name: layer for layer in self.layers for name in layer.names}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields replaced, unchecked. What was worked out from the old fields stays behind."""
        copied = super().model_copy(update=update, deep=deep)
        for name, value in vars(type(self)).items():
            if isinstance(value, cached_property):
                vars(copied).pop(name, None)
        return copied

    def renamed(self, names: Mapping[str, str]) -> "Plan":
        """The same plan for a model that calls its layers otherwise; what `names` does not have keeps its name."""
        if all(name == own for name, own in names.items()):
            return self

        def new(name: str) -> str:
            return names.get(name, name)

        layers = tuple(
            layer.model_copy(update={"name": new(layer.name), "tied": tuple(map(new, layer.tied))})
            for layer in self.layers
        )
        left_alone = tuple(_with_layer_name(parameter, new) for parameter in self.left_alone)
        skipped = tuple(map(new, self.skipped))
        return self.model_copy(update={"layers": layers, "skipped": skipped, "left_alone": left_alone})

    def to_json(self) -> str:
        """Readable JSON in a stable order, one line per layer; equal plans give equal bytes."""
        document = self.model_dump(mode="json", exclude_none=True)
        if not self.left_alone:  # as plans were before there was such a field
            del document["left_alone"]
        layers = [{key: value for key, value in layer.items() if value != []} for layer in document.pop("layers")]
        head = "".join(f"  {_one_line(key)}: {_one_line(value)},\n" for key, value in document.items())
        lines = ",\n".join(f"    {_one_line(layer)}" for layer in layers)
        return f'{{\n{head}  "layers": [\n{lines}\n  ]\n}}\n'

    def save(self, path: str | Path) -> None:
        """Write the plan; an interruption leaves an older file whole."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read, migrate and validate a plan. Raises FormatError naming file, field and value."""
        path = Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FormatError(f"{path}: cannot read it ({error.strerror}). Give a plan file.") from error
        except (ValueError, RecursionError) as error:
            raise FormatError(
                f"{path}: not JSON ({error}); a plan is a JSON file that `mpq plan` writes, or that `mpq inspect "
                "CONTAINER --plan` takes out of a container"
            ) from error
        return cls.from_document(document, str(path))

    @classmethod
    def from_document(cls, document: Any, where: str) -> "Plan":
        """Migrate and validate a parsed plan; `where` names it in errors."""
        if not isinstance(document, dict) or document.get("format") != PLAN_FORMAT:
            raise FormatError(f"{where}: not a plan; 'format' must be {PLAN_FORMAT!r}")
        version = document.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise FormatError(f"{where}: version: {version!r} is not allowed; 1 to {PLAN_VERSION}")
        if version > PLAN_VERSION:
            raise FormatError(
                f"{where}: plan version {version}, and this mpq-plugins reads up to {PLAN_VERSION}. Upgrade it."
            )
        for step in range(version, PLAN_VERSION):
            document = MIGRATIONS[step](document)
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise FormatError(f"{where}: {first_problem(error)}") from error

    def size(self, scale_bits: int = 32) -> "PlanSize":
        """What the plan promises in bits; see size.plan_size."""
        from .size import plan_size

        return plan_size(self, scale_bits)

    def diff(self, other: "Plan") -> "tuple[Difference, ...]":
        """The layers in which `other` differs, in this plan's order, then those only `other` has."""
        names = [*self.by_name, *(name for name in other.by_name if name not in self.by_name)]
        pairs = ((name, self.by_name.get(name), other.by_name.get(name)) for name in names)
        return tuple(Difference(name=n, before=a, after=b) for n, a, b in pairs if a != b)

    def with_activation_bits(self, bits: int | None) -> "Plan":
        """The same plan with other activation bits, 1 to 16 or None. Raises SettingError."""
        if bits is not None and (type(bits) is not int or bits not in range(1, 17)):
            raise SettingError(f"activation_bits: {bits!r} is not allowed; 1 to 16, or none for floating point")
        return self.model_copy(update={"activation_bits": bits})


def _with_layer_name(parameter: str, new: Callable[[str], str]) -> str:
    """A parameter of a layer that is called otherwise."""
    if parameter == "weight" or parameter.endswith(".weight"):
        renamed = new(parameter.removesuffix("weight").removesuffix("."))
        return f"{renamed}.weight" if renamed else "weight"
    return new(parameter)


def _one_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class Difference(BaseModel):
    """One layer of two plans; None where a plan lacks it."""

    model_config = ConfigDict(frozen=True)

    name: str
    before: LayerChoice | None
    after: LayerChoice | None


if __name__ == "__main__":  # how plan.schema.json is made
    print(json.dumps(Plan.model_json_schema(), indent=2))
