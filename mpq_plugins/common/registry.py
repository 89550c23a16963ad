"""What is installed: allocators, adapters and sensitivities, found by entry points and imported only when used."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import PluginError
from .outsiders import outsiders

GROUPS = ("allocators", "adapters", "sensitivities")
REQUIRED: dict[str, tuple[str, ...]] = {
    "allocators": ("name", "needs", "__call__"),
    "sensitivities": ("name", "measure"),
}
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


def load(group: str, name: str) -> Any:
    """Import what the entry point names.

    Raises PluginError: unknown (the known ones are listed), broken, or lacking what its group requires.
    """
    known = {plugin.name: plugin for plugin in _sorted(group)}
    if name not in known:
        raise PluginError(f"{group}: {name!r} is not installed; there are {', '.join(known) or 'none'}")
    plugin = known[name]
    where = f"{group}: {name!r} of {plugin.distribution}"
    with outsiders(lambda said: PluginError(f"{where} cannot be imported from {plugin.target} ({said})")):
        value = EntryPoint(plugin.name, plugin.target, f"mpq_plugins.{group}").load()
        has = {*dir(value), *getattr(value, "__dataclass_fields__", ())}
    lacking = [attribute for attribute in REQUIRED.get(group, ()) if attribute not in has]
    if lacking:
        raise PluginError(f"{where} ({plugin.target}) lacks {', '.join(lacking)}")
    return value


def _sorted(group: str) -> tuple[Plugin, ...]:
    found: dict[str, Plugin] = {}
    for entry in entry_points(group=f"mpq_plugins.{group}"):
        plugin = Plugin(group, entry.name, entry.value, entry.dist.name if entry.dist else "unknown")
        other = found.setdefault(entry.name, plugin)
        if other != plugin:
            raise PluginError(
                f"{group}: {entry.name!r} is declared by both {other.distribution} ({other.target}) and "
                f"{plugin.distribution} ({plugin.target}). Uninstall one."
            )
    return tuple(found[name] for name in sorted(found))
