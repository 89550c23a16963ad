"""What an allocator is, and the plan every allocator starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingError
from ..plans.channels import Channels
from ..plans.layers import ALLOWED_BITS, LayerChoice, Part
from ..plans.names import may_be_layer, weight_name
from ..plans.plan import AllocatorRecord, Plan
from ..plans.scheme import FLOAT_BITS, Scheme
from ..plans.table import LayerStats, LayerTable

Widths = int | Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class Needs:
    """What a table must hold for an allocator: these errors at these bit-widths.

    scheme: what to measure under where the user asks for nothing else.
    """

    bits: tuple[int, ...]
    metrics: tuple[str, ...] = ()
    channel_errors: bool = False
    scheme: Scheme | None = None


class Allocator(Protocol):
    """A frozen dataclass: its fields are its parameters, and its options on the command line.

    `name` is how plans and the command line call it. Annotated[type, "text"] on a field gives its help. A class
    attribute `grid`, field -> values, is what `mpq sweep` tries where the user names none.
    """

    name: ClassVar[str]

    @property
    def needs(self) -> Needs:
        """What to measure before calling it."""
        ...

    def __call__(self, table: LayerTable) -> Plan:
        """The plan; the same table and value give the same bytes."""
        ...


def make_plan(
    table: LayerTable, allocator: Any, bits: Mapping[str, Widths], *, found: Mapping[str, Any] | None = None
) -> Plan:
    """A plan that gives each layer of the table its bits: one width, or one for each of its output channels.

    It is signed by the allocator (a frozen dataclass); `found` records what the allocator worked out beyond its own
    fields. Warns with PlanWarning of a plan predicted to be worse than uniform widths (guard.py). Raises SettingError,
    naming the layer, for a width that the table's scheme does not have.
    """
    plan = Plan.model_construct(  # every part of it is valid
        made_with={"mpq-plugins": _own_version()},
        allocator=AllocatorRecord(name=allocator.name, parameters={**_parameters(allocator), **(found or {})}),
        model=table.fingerprint,
        fold_bn=table.fold_bn,
        skipped=table.skipped,
        weights=table.weights,
        left_alone=_taken_for_layers(table),
        layers=tuple(layer_choice(layer, bits[layer.name], table.scheme) for layer in table.layers),
    )
    from ..guard import warn_if_worse  # which compares with what allocators make

    warn_if_worse(table, plan)
    return plan


def layer_choice(layer: LayerStats, bits: Widths, scheme: Scheme) -> LayerChoice:
    """A measured layer at these bits; channels of the same width become a part, parts ascend in width."""
    if isinstance(bits, int):
        return _whole(layer, bits, scheme)
    widths = np.asarray(bits)
    if widths.shape != (layer.channels,):
        raise SettingError(f"layer {layer.name!r}: {widths.size} widths for {layer.channels} channels")
    distinct = np.unique(widths).tolist()
    if len(distinct) <= 1:  # a layer without channels has any width
        return _whole(layer, distinct[0] if distinct else 8, scheme)
    parts = tuple(
        Part.model_construct(bits=_checked(layer, b, scheme, len(channels)), channels=Channels.of(channels))
        for b, channels in ((b, np.flatnonzero(widths == b)) for b in distinct)
    )
    return _construct(layer, scheme, parts=parts)


# Ten plans from one table should cost hardly more than one, so a layer's choices are made once, for as long as
# the table lives.
_CHOICES: WeakKeyDictionary[LayerStats, dict[tuple[int, Scheme], LayerChoice]] = WeakKeyDictionary()


def _whole(layer: LayerStats, bits: int, scheme: Scheme) -> LayerChoice:
    made = _CHOICES.setdefault(layer, {})
    key = (bits, scheme)
    if key not in made:
        made[key] = _construct(layer, scheme, bits=_checked(layer, bits, scheme, layer.channels))
    return made[key]


def _construct(layer: LayerStats, scheme: Scheme, **bits: Any) -> LayerChoice:
    return LayerChoice.model_construct(  # the rest is a measured layer's, valid already
        name=layer.name, kind=layer.kind, shape=layer.shape, channel_axis=layer.channel_axis,
        numel=layer.numel, scheme=scheme, tied=layer.tied, **bits,
    )  # fmt: skip


def _checked(layer: LayerStats, bits: int, scheme: Scheme, channels: int) -> int:
    if type(bits) is not int or bits not in ALLOWED_BITS:
        raise SettingError(f"layer {layer.name!r}: {bits!r} bits are not allowed; 1 to 8, or 16 or 32 for float")
    if bits not in FLOAT_BITS:
        scheme.check_bits(bits, f"layer {layer.name!r}: bits")
        scheme.check_part(bits, layer.shape, layer.channel_axis, channels, layer.name)
    return bits


def _taken_for_layers(table: LayerTable) -> tuple[str, ...]:
    """What a module said is no layer, and a bare file could not tell."""
    skipped = {weight_name(name) for name in table.skipped}
    return tuple(name for name, _ in table.left_alone if may_be_layer(name) and name not in skipped)


@cache
def _own_version() -> str:
    return version("mpq-plugins")


def _parameters(allocator: Any) -> dict[str, Any]:
    # Lists, as JSON gives them back: a plan loaded from its file equals the plan saved.
    values = {field.name: getattr(allocator, field.name) for field in fields(allocator)}
    return {name: _plain(value) for name, value in values.items() if value is not None and value != ()}


def _plain(value: Any) -> Any:
    """As JSON has it: a scheme by its fields, any other value of its own kind by what it says of itself."""
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    if isinstance(value, Scheme):
        return asdict(value)
    return value if isinstance(value, str | int | float | bool | dict) else str(value)
