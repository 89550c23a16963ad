"""What an allocator is, and the plan every allocator starts from."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

from ..errors import SettingError
from ..plans.arguments import check_table
from ..plans.layers import LayerChoice
from ..plans.names import may_be_layer, weight_name
from ..plans.plan import AllocatorRecord, Plan
from ..plans.scheme import Scheme
from ..plans.table import LayerTable
from .choices import layer_choice
from .contract import Widths

LOG = logging.getLogger(__name__)


def make_plan(
    table: LayerTable, allocator: Any, bits: Mapping[str, Widths], *, found: Mapping[str, Any] | None = None
) -> Plan:
    """Make a plan that gives each layer of the table its bits, signed by the allocator.

    It warns with PlanWarning of a plan predicted to be worse than uniform widths (guard.py).

    Args:
        table: The measured layers.
        allocator: A frozen dataclass, which the plan records with its fields.
        bits: Widths by layer name: one for the layer, or one for each of its output channels.
        found: What the allocator worked out beyond its own fields, to be recorded too.

    Returns:
        The plan.

    Raises:
        SettingError: A width that the table's scheme does not have. The message names the layer.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> table = mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 2)))
        >>> mpq.make_plan(table, mpq.Uniform(), {"0": [4, 8]}).layers[0].bits_text
        '4x1 8x1'
    """
    check_table(table)
    _check_signed(allocator)
    if not isinstance(bits, Mapping):
        raise SettingError(f"bits: is a {type(bits).__name__}; a mapping of layers' names to widths")
    layers = (layer_choice(layer, _widths_of(layer.name, bits), table.scheme) for layer in table.layers)
    plan = plan_of(table, allocator, layers, found or {})
    # Some are tried by the dozen on the way to the one that is wanted; a solve is worth a line.
    said = "".join(f", {name} {value}" for name, value in (found or {}).items())
    LOG.log(logging.INFO if found else logging.DEBUG, "%s: %d layers%s", allocator.name, len(plan.layers), said)
    from .guard import warn_if_worse  # which compares with what allocators make

    warn_if_worse(table, plan)
    return plan


def _check_signed(allocator: object) -> None:
    """Raise SettingError for what has no name and fields to sign a plan with."""
    named = isinstance(getattr(allocator, "name", None), str)
    if isinstance(allocator, type) or not (named and is_dataclass(allocator)):
        raise SettingError(
            f"allocator: {type(allocator).__name__} is none; a dataclass with a name, as Uniform(bits=4)"
        )


def _widths_of(name: str, bits: Mapping[str, Widths]) -> Widths:
    """What the mapping gives a layer, which may be its default. Raises SettingError where it gives nothing."""
    try:
        return bits[name]
    except KeyError as error:
        raise SettingError(f"bits: layer {name!r} has no width; give one for every layer of the table") from error


def plan_of(table: LayerTable, allocator: Any, layers: Iterable[LayerChoice], found: Mapping[str, Any]) -> Plan:
    """The plan of these choices, valid each, signed by the allocator; nothing is compared."""
    return Plan.model_construct(
        made_with={"mpq-plugins": _own_version()},
        allocator=AllocatorRecord(name=allocator.name, parameters=_parameters(allocator), found=dict(found)),
        model=table.fingerprint,
        fold_bn=table.fold_bn,
        skipped=table.skipped,
        weights=table.weights,
        left_alone=_taken_for_layers(table),
        rest_bytes=table.rest_bytes,
        layers=tuple(layers),
    )


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
    return {name: _plain(value) for name, value in values.items() if not _unsaid(value)}


def _unsaid(value: object) -> bool:
    return value is None or (isinstance(value, tuple) and not value)


def _plain(value: Any) -> Any:
    """As JSON has it: a scheme by its name and fields, any other value of its own kind by what it says of itself."""
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    if isinstance(value, Scheme):
        return {"name": value.name, **asdict(value)}  # which need not be a field
    return value if isinstance(value, str | int | float | bool | dict) else str(value)
