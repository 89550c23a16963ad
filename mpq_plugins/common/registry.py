"""What is installed: allocators, adapters, sensitivities and schemes, found by entry points, imported when used."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import PluginError
from .outsiders import outsiders

GROUPS = ("allocators", "adapters", "sensitivities", "schemes")
REQUIRED: dict[str, tuple[str, ...]] = {
    "allocators": ("name", "needs", "__call__"),
    "adapters": ("CAPABILITIES", "check", "apply", "verify"),
    "sensitivities": ("name", "measure"),
    "schemes": (
        "name", "quantizer", "granularity", "group_size", "searches", "sorts", "scales_per_group", "as_affine",
        "as_codebook", "check_bits", "check_part", "levels", "has_zero", "interval_bits", "zero_point_bits",
        "codebook_entries", "groups_per_channel", "group_count",
    ),
}  # fmt: skip
"""What a plugin of each group must have, by name."""


@dataclass(frozen=True)
class Plugin:
    """One entry point: its group (`allocators`, ...), name, target and the distribution that declares it."""

    group: str
    name: str
    target: str
    distribution: str


def installed() -> tuple[Plugin, ...]:
    """Every plugin of every group, sorted; nothing is imported. Raises PluginError for a name with two owners."""
    return tuple(plugin for group in GROUPS for plugin in _sorted(group))


def names(group: str) -> tuple[str, ...]:
    """The names of a group's plugins, sorted, whatever is wrong with them."""
    return tuple(sorted({entry.name for entry in entry_points(group=f"mpq_plugins.{group}")}))


def owner(group: str, name: str) -> Plugin | None:
    """The plugin of that name; None where none is installed. Raises PluginError for a name with two owners."""
    return next(iter(_sorted(group, name)), None)


def load(group: str, name: str) -> Any:
    """Import what the entry point names.

    Raises PluginError: unknown (the known ones are listed), declared twice, broken, or lacking what its group requires.
    """
    plugin = owner(group, name)
    if plugin is None:
        raise PluginError(f"{group}: {name!r} is not installed; there are {', '.join(names(group)) or 'none'}")
    return imported(plugin, plugin.target, REQUIRED.get(group, ()))


def imported(plugin: Plugin, target: str, required: Sequence[str] = ()) -> Any:
    """What `target` (`package.module:name`) names, which is the plugin or belongs to it. Raises PluginError."""
    where = f"{plugin.group}: {plugin.name!r} of {plugin.distribution}"
    with outsiders(lambda said: PluginError(f"{where} cannot be imported from {target} ({said})")):
        value = EntryPoint(plugin.name, target, f"mpq_plugins.{plugin.group}").load()
    has = {*dir(value), *getattr(value, "__dataclass_fields__", ())}
    lacking = [attribute for attribute in required if attribute not in has]
    if lacking:
        raise PluginError(f"{where}, {target}, lacks {', '.join(lacking)}")
    return value


def _sorted(group: str, name: str | None = None) -> tuple[Plugin, ...]:
    """The plugins of a group, or those of that name. Raises PluginError for a name with two owners among them."""
    plugins: dict[str, Plugin] = {}
    for entry in entry_points(group=f"mpq_plugins.{group}"):
        if name not in (None, entry.name):
            continue
        plugin = Plugin(group, entry.name, entry.value, entry.dist.name if entry.dist else "unknown")
        other = plugins.setdefault(entry.name, plugin)
        if other != plugin:
            raise PluginError(
                f"{group}: {entry.name!r} is declared by both {other.distribution} ({other.target}) and "
                f"{plugin.distribution} ({plugin.target}). Uninstall one."
            )
    return tuple(plugins[name] for name in sorted(plugins))
