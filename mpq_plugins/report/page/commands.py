"""A plan's record as the command that makes the plan again."""

import shlex
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from ...common import registry
from ...errors import MPQError, PlanWarning
from ...plans.plan import AllocatorRecord, Plan
from ...plans.table import LayerTable

MOST_CHANNELS = 5_000  # of which widths are decided channel by channel while a page is written


def plan_command(record: AllocatorRecord, table: str) -> str | None:
    """Write the command line that makes a plan from its table.

    Args:
        record: Who made the plan, with which parameters.
        table: The table's file.

    Returns:
        The command, quoted for a shell; None for an allocator that is not installed here, or a parameter that no
        option gives.

    Examples:
        >>> plan_command(AllocatorRecord(name="mixquant", parameters={"qem": 2.0, "metric": "mse"}), "t.mpqt")
        'mpq plan t.mpqt -a mixquant --metric mse -o plan.json'
    """
    defaults = defaults_of(record.name)
    if defaults is None:
        return None
    words = ["mpq", "plan", as_argument(table), "-a", record.name]
    for name, value in record.parameters.items():
        if name not in defaults:
            return None
        if not _same(value, defaults[name]):
            if isinstance(value, dict):
                return None
            words += _option(name, value)
    return shlex.join([*words, "-o", "plan.json"])


def makes_again(plan: Plan, table: LayerTable) -> bool:
    """Tell whether a plan's allocator makes just this plan of a table, by letting it.

    A plan that was legalised, edited, or made of another measurement has a record too.

    Args:
        plan: The plan, whoever made it.
        table: The table.

    Returns:
        Whether it does; False too where trying takes minutes.
    """
    if plan.model != table.fingerprint or (_by_channel(plan) and _channels(table) > MOST_CHANNELS):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlanWarning)  # the page says it of the plan
            allocator: Any = registry.load("allocators", plan.allocator.name)(**plan.allocator.parameters)
            unmeasured = set(allocator.needs.bits) - set(table.bits)  # which `mpq plan` refuses
            return not unmeasured and bool(allocator(table).layers == plan.layers)
    except (MPQError, TypeError):  # not installed, not of this table, or a parameter of another version
        return False


def _by_channel(plan: Plan) -> bool:
    return bool(plan.allocator.parameters.get("parts"))


def _channels(table: LayerTable) -> int:
    return sum(layer.channels for layer in table.layers)


def as_argument(file: str) -> str:
    """A file as no command takes it for an option.

    Examples:
        >>> as_argument("-net.mpqt")
        './-net.mpqt'
    """
    return f"./{file}" if file.startswith("-") else file


@cache
def defaults_of(name: str) -> Mapping[str, Any] | None:
    """An allocator's fields with their defaults; None where it is not installed. Looking it up takes a while."""
    try:
        allocator: Any = registry.load("allocators", name)
    except MPQError:
        return None
    return {one.name: None if one.default is MISSING else one.default for one in fields(allocator)}


def _option(name: str, value: Any) -> list[str]:
    spelled = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [spelled if value else f"--no-{name.replace('_', '-')}"]
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return [word for one in value for word in (spelled, one)]
    if isinstance(value, list):
        return [spelled, ",".join(map(str, value))]
    return [spelled, str(value)]


def _same(value: Any, default: Any) -> bool:
    return bool(value == (list(default) if isinstance(default, tuple) else default))


def measure_command(options: Mapping[str, str] | None = None) -> str:
    """Write the command that measures what a view lacks.

    Args:
        options: Options beside those that a page needs at least, with their values.

    Returns:
        The command.

    Examples:
        >>> measure_command({"--sensitivity": "kl"})
        'mpq measure SOURCE --bits 1-8 --granularity per_channel --per-channel-errors --sensitivity kl -o TABLE'
    """
    more = "".join(f" {name} {value}" for name, value in (options or {}).items())
    return f"mpq measure SOURCE --bits 1-8 --granularity per_channel --per-channel-errors{more} -o TABLE"
