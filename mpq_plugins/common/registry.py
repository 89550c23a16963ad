"""What is installed: allocators, adapters, exporters, sensitivities, schemes, found by entry points."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import PluginError
from .checks import shown
from .extras import missing_for
from .outsiders import outsiders
from .text import did_you_mean

OURS = "mpq-plugins"
BACKENDS = ("adapters", "exporters", "configs")
"""Groups whose plugins may need a package that an extra brings."""
GROUPS = ("allocators", *BACKENDS, "sensitivities", "schemes")
REQUIRED: dict[str, tuple[str, ...]] = {
    "allocators": ("name", "needs", "__call__"),
    "adapters": ("CAPABILITIES", "check", "apply", "verify"),
    "exporters": ("CAPABILITIES", "check", "export", "verify"),
    "configs": ("CAPABILITIES", "config"),
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
    """Every plugin of every group, sorted, all owners of a name among them; nothing is imported."""
    return tuple(plugin for group in GROUPS for plugin in _declared(group))


def names(group: str) -> tuple[str, ...]:
    """The names of a group's plugins, sorted, whatever is wrong with them."""
    return tuple(sorted({entry.name for entry in entry_points(group=f"mpq_plugins.{group}")}))


def owner(group: str, name: str) -> Plugin | None:
    """The plugin of that name; None where none is installed. Raises PluginError for a name with two owners."""
    owners = [plugin for plugin in _declared(group) if plugin.name == name]
    if len(owners) > 1:
        said = " and ".join(f"{plugin.distribution} ({plugin.target})" for plugin in owners)
        raise PluginError(f"{group}: {name!r} is declared by both {said}. Uninstall one.")
    return owners[0] if owners else None


def described(group: str, value: Any) -> str:
    """`allocators: 'best' of some-distribution`, as errors name a plugin by its value or class.

    Without the distribution where the value is of another package than what is installed under its name.
    """
    name = getattr(value, "name", None)
    if not isinstance(name, str):
        name = _class(value).__name__
    with suppress(PluginError):  # of two owners neither is said to be it
        plugin = owner(group, name)
        if plugin is not None and _package(_class(value).__module__) == _package(plugin.target):
            return f"{group}: {name!r} of {plugin.distribution}"
    return f"{group}: {name!r}"


@contextmanager
def at_work(group: str, value: Any) -> Iterator[None]:
    """What a plugin of another package raises is its own fault, and PluginError says so; what ours do is ours."""
    if _package(_class(value).__module__) == "mpq_plugins":
        yield
        return
    with outsiders(lambda said: PluginError(f"{described(group, value)} failed ({said})")):
        yield


def load(group: str, name: str) -> Any:
    """Import what the entry point names.

    Raises PluginError: unknown (the known ones are listed), declared twice, broken, or lacking what its group requires.
    """
    plugin = owner(group, name)
    if plugin is None:
        raise PluginError(
            f"{group}: {shown(name)} is not installed; there are {', '.join(names(group)) or 'none'}"
            f"{did_you_mean(name, names(group))}"
        )
    if group in BACKENDS and plugin.distribution == OURS and (missing := missing_for(name)):
        raise PluginError(f"{group}: {name!r} cannot be used, for {missing}")
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


def _declared(group: str) -> tuple[Plugin, ...]:
    """What is declared in a group, sorted by name; what two folders say of one distribution is one plugin."""
    declared = {
        Plugin(group, entry.name, entry.value, entry.dist.name if entry.dist else "unknown")
        for entry in entry_points(group=f"mpq_plugins.{group}")
    }
    return tuple(sorted(declared, key=lambda plugin: (plugin.name, plugin.distribution, plugin.target)))


def _package(place: str) -> str:
    """The package at the top of `package.module:name`."""
    return place.partition(":")[0].partition(".")[0]


def _class(value: Any) -> type:
    return value if isinstance(value, type) else type(value)
