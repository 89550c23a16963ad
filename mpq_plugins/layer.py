"""What tables and plans both say of a layer, and what both refuse: shapes that no memory holds, unknown kinds."""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from .channels import MOST_CHANNELS
from .documents import Strict

KINDS = (
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "embedding",
)  # fmt: skip
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
