"""What an allocator is, and the plan every allocator starts from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

from ..errors import SettingError
from ..plan import ALLOWED_BITS, AllocatorRecord, LayerChoice, Plan
from ..scheme import Scheme
from ..table import LayerStats, LayerTable


@dataclass(frozen=True)
class Needs:
    """What a table must hold for an allocator: these errors at these bit-widths."""

    bits: tuple[int, ...]
    metrics: tuple[str, ...] = ()
    channel_errors: bool = False


class Allocator(Protocol):
    """A frozen dataclass: its fields are its parameters, and its options on the command line.

    `name` is how plans and the command line call it. Annotated[type, "text"] on a field gives its help.
    """

    name: ClassVar[str]

    @property
    def needs(self) -> Needs:
        """What to measure before calling it."""
        ...

    def __call__(self, table: LayerTable) -> Plan:
        """The plan; the same table and value give the same bytes."""
        ...


def make_plan(table: LayerTable, allocator: Any, bits: Mapping[str, int], scheme: Scheme | None = None) -> Plan:
    """A plan that gives each layer of the table its bits, signed by the allocator (a frozen dataclass)."""
    return Plan.model_construct(  # every part of it is valid
        made_with={"mpq-plugins": _own_version()},
        allocator=AllocatorRecord(name=allocator.name, parameters=_parameters(allocator)),
        model=table.fingerprint,
        fold_bn=table.fold_bn,
        skipped=table.skipped,
        layers=tuple(_choice(layer, bits[layer.name], scheme or table.scheme) for layer in table.layers),
    )


# Ten plans from one table should cost hardly more than one, so a layer's choices are made once, for as long as
# the table lives.
_CHOICES: WeakKeyDictionary[LayerStats, dict[tuple[int, Scheme], LayerChoice]] = WeakKeyDictionary()


def _choice(layer: LayerStats, bits: int, scheme: Scheme) -> LayerChoice:
    made = _CHOICES.setdefault(layer, {})
    key = (bits, scheme)
    if key not in made:
        if type(bits) is not int or bits not in ALLOWED_BITS:
            raise SettingError(f"layer {layer.name!r}: {bits!r} bits are not allowed; 1 to 8, or 16 or 32 for float")
        made[key] = LayerChoice.model_construct(  # the rest is a measured layer's, valid already
            name=layer.name, kind=layer.kind, shape=layer.shape, channel_axis=layer.channel_axis,
            numel=layer.numel, bits=bits, scheme=scheme, tied=layer.tied,
        )  # fmt: skip
    return made[key]


@cache
def _own_version() -> str:
    return version("mpq-plugins")


def _parameters(allocator: Any) -> dict[str, Any]:
    # Lists, as JSON gives them back: a plan loaded from its file equals the plan saved.
    values = asdict(allocator).items()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values if value is not None}
