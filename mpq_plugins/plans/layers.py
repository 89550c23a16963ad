"""What tables and plans both say of a layer, and what both refuse: shapes that no memory holds, unknown kinds."""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from ..common.documents import Strict
from ..common.public import public
from .activations import Activations
from .channels import MOST_CHANNELS, Channels, cover
from .granular import FLOAT_BITS, INTEGER_BITS
from .scheme_names import NamedScheme
from .type_names import type_name

ALLOWED_BITS = (*INTEGER_BITS, *FLOAT_BITS)


KINDS = (
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "embedding",
)  # fmt: skip
MOST_BESIDE = 1 << 16  # bytes that a layer's codes take beside themselves
LARGEST_SIDE, LARGEST_SHAPE = 1 << 40, 1 << 62

Side = Annotated[int, Field(ge=0)]


def _check_kind(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"{kind[:60]!r} is not allowed; {', '.join(KINDS)}")
    return kind


Kind = Annotated[str, AfterValidator(_check_kind), Field(json_schema_extra={"enum": list(KINDS)})]


class LayerDocument(Strict):
    """A layer's name, kind, shape and output axis."""

    name: str
    kind: Kind
    shape: Annotated[tuple[Side, ...], Field(min_length=1)]
    channel_axis: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        where = f"layer {self.name!r}"
        if max(self.shape) > LARGEST_SIDE or beyond_memory(self.shape):
            raise ValueError(f"{where}: shape {str(self.shape)[:80]} is beyond any memory")
        if self.channel_axis >= len(self.shape):
            raise ValueError(f"{where}: channel_axis {self.channel_axis} does not fit shape {self.shape}")
        if self.channels > MOST_CHANNELS:
            raise ValueError(f"{where}: {self.channels} output channels; {MOST_CHANNELS} is the most")
        return self

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.shape[self.channel_axis]


def check_once(layers: Iterable[Sequence[str]], skipped: Iterable[str]) -> None:
    """Raise ValueError for a name that two layers have, or that is skipped as well; layers: the names of each."""
    seen: set[str] = set()
    for name in [name for names in layers for name in names]:
        if name in seen:
            raise ValueError(f"layers: {name!r} appears more than once")
        seen.add(name)
    for name in skipped:
        if name in seen:
            raise ValueError(f"skipped: {name!r} is a layer as well, or appears more than once")
        seen.add(name)


def beyond_memory(shape: Sequence[int]) -> bool:
    """Whether no memory holds a tensor of these sides, those of 0 left out."""
    return math.prod(side for side in shape if side) > LARGEST_SHAPE


def width_text(bits: int) -> str:
    """`5`; `float16` and `float32` for 16 and 32 bits."""
    return f"float{bits}" if bits in FLOAT_BITS else str(bits)


def _check_plan_bits(bits: int) -> int:
    if bits not in ALLOWED_BITS:
        raise ValueError(f"{bits} is not allowed; 1 to 8, or 16 or 32 for floating point")
    return bits


def _channels(value: Any, info: ValidationInfo) -> Channels:
    if info.mode == "json" and not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is no channel or run of channels; write '0-2,5'")
    return Channels.of(value)


Bits = Annotated[
    int,
    Field(json_schema_extra={"enum": list(ALLOWED_BITS)}),
    BeforeValidator(lambda bits: _check_plan_bits(bits) if type(bits) is int else bits),
]


ChannelRuns = Annotated[
    Sequence[int],
    PlainValidator(_channels),
    PlainSerializer(lambda channels: str(Channels.of(channels)), return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$"}),
]


@public
class Part(Strict):
    """Output channels that share a bit-width.

    Attributes:
        bits: 1 to 8, 16 for float16, 32 for what is left alone.
        channels: The channels, ascending.

    Examples:
        >>> import mpq_plugins as mpq
        >>> mpq.Part(bits=4, channels=range(3)).model_dump()
        {'bits': 4, 'channels': '0-2'}
    """

    bits: Bits
    channels: ChannelRuns

    @property
    def runs(self) -> Channels:
        """The channels, as they are kept."""
        return Channels.of(self.channels)


@public
class LayerChoice(LayerDocument):
    """What one layer gets: either `bits` for all of it or `parts` that cover its output channels once each.

    Attributes:
        name: Its name in the model, without `.weight`.
        kind: What it is, as `linear` or `conv2d`.
        shape: The weight's shape.
        channel_axis: The axis of output channels.
        numel: The number of weights.
        bits: 1 to 8, 16 for float16, 32 for what is left alone; None where there are parts.
        parts: The parts; None where there are bits.
        scheme: How its weights become codes.
        coded_bytes: What its codes take in an entropy-coded file, as the plan promises; None where it makes no promise,
            and codes count b bits each.
        activations: How its input is quantized; None for floating point. An embedding has none, for it takes indices.
        tied: Other names of the same weight.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 2))))
        >>> plan.layers[0].widths, plan.layers[0].code_bits
        (((4, 2),), 64)
    """

    numel: Annotated[int, Field(ge=0)]
    bits: Bits | None = None
    parts: tuple[Part, ...] | None = None
    scheme: NamedScheme
    coded_bytes: Annotated[int, Field(ge=0)] | None = None
    activations: Activations | None = None
    tied: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        where = f"layer {self.name!r}"
        if math.prod(self.shape) != self.numel:
            raise ValueError(f"{where}: numel {self.numel} does not fit shape {self.shape}")
        if (self.bits is None) == (self.parts is None):
            raise ValueError(f"{where}: give either bits or parts")
        if self.parts is not None:
            runs = [part.runs for part in self.parts]
            if not all(map(len, runs)) or not runs or not cover(runs, self.channels):
                raise ValueError(
                    f"{where}: parts must cover channels 0 to {self.channels - 1} once each, ascending, none empty"
                )
        for bits, channels in self.widths:
            if bits not in FLOAT_BITS:
                self.scheme.check_bits(bits, f"{where}: bits")
                self.scheme.check_part(bits, self.shape, self.channel_axis, channels, self.name)
        self.scheme.groups_per_channel(self.shape, self.channel_axis, self.name)
        self._check_coded(where)
        self.check_activations()
        return self

    def check_activations(self) -> None:
        """Raise ValueError for inputs that such a layer does not take."""
        where = f"layer {self.name!r}"
        if self.activations is None:
            return
        if self.kind == "embedding":
            raise ValueError(f"{where}: activations: an embedding takes indices, which are not quantized")
        if self.activations.dynamic == "per_token" and self.kind != "linear":
            raise ValueError(f"{where}: activations: per_token belongs to linear layers, and this is {self.kind}")

    def _check_coded(self, where: str) -> None:
        """Raise ValueError for a promise of coded bytes that no file keeps."""
        if self.coded_bytes is None:
            return
        if self.scheme.name != "entropy_coded" or any(bits in FLOAT_BITS for bits, _ in self.widths):
            raise ValueError(f"{where}: coded_bytes belongs to a layer of codes under the entropy_coded scheme")
        if self.coded_bytes > 2 * self.numel + MOST_BESIDE:
            raise ValueError(
                f"{where}: coded_bytes {self.coded_bytes:,} is not allowed; {self.numel:,} weights take at most "
                f"{2 * self.numel + MOST_BESIDE:,}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, then its tied ones."""
        return (self.name, *self.tied)

    @property
    def activation_bits(self) -> int | None:
        """Bits of its input; None for floating point."""
        return None if self.activations is None else self.activations.bits

    @property
    def type(self) -> str | None:
        """The name of the type that it is stored as; None where its scheme is no named type, or it is in float."""
        return None if self.bits is None or self.in_float else type_name(self.scheme, self.bits)

    @property
    def all_parts(self) -> tuple[Part, ...]:
        """The parts, a layer without parts being one."""
        if self.parts is not None:
            return self.parts
        assert self.bits is not None
        return (Part(bits=self.bits, channels=range(self.channels)),)

    @property
    def in_float(self) -> bool:
        """Whether all of the layer stays in floating point."""
        return all(part.bits in FLOAT_BITS for part in self.all_parts)

    @property
    def in_float16(self) -> bool:
        """Whether all of the layer is float16."""
        return all(bits == 16 for bits, _ in self.widths)

    @property
    def rounded_in_float(self) -> bool:
        """Whether the layer is in float, and some of its channels are rounded to float16."""
        return self.in_float and any(bits == 16 for bits, _ in self.widths)

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """Bits, and how many channels have them."""
        if self.bits is not None:
            return ((self.bits, self.channels),)
        return tuple((part.bits, len(part.channels)) for part in self.all_parts)

    @property
    def bits_text(self) -> str:
        """`5`, `mxfp4`, `3x12 8x4` for parts: bits x channels; `1.25 coded`; `float16` and `float32` in float."""
        if self.coded_bytes is not None:
            return f"{8 * self.coded_bytes / max(1, self.numel):.2f} coded"
        if self.bits is not None:
            return self.type or width_text(self.bits)
        return " ".join(f"{width_text(bits)}x{count}" for bits, count in self.widths)

    @property
    def code_bits(self) -> int:
        """Bits of all codes together: what the plan promises of an entropy-coded file, or b for each."""
        if self.coded_bytes is not None:
            return 8 * self.coded_bytes
        if self.bits is not None:
            return self.numel * self.bits
        per_channel = self.numel // max(1, self.channels)
        return sum(part.bits * len(part.channels) * per_channel for part in self.all_parts)
