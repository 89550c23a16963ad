"""A plan's record as the command that makes the plan again."""

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from ...common import registry
from ...errors import MPQError
from ...plans.plan import AllocatorRecord


def plan_command(record: AllocatorRecord, table: str) -> str | None:
    """Write the command line that makes a plan from a table.

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
    defaults = _defaults(record.name)
    if defaults is None:
        return None
    words = ["mpq", "plan", table, "-a", record.name]
    for name, value in record.parameters.items():
        if name not in defaults:
            return None
        if not _same(value, defaults[name]):
            if isinstance(value, dict):
                return None
            words += _option(name, value)
    return shlex.join([*words, "-o", "plan.json"])


@cache
def _defaults(name: str) -> Mapping[str, Any] | None:
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
