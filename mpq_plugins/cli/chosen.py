"""Which allocator a command line asks for: the one that -a names, or the one that the options belong to."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import click

from ..common import registry
from ..common.checks import as_integer
from ..errors import PluginError
from .field_options import OptionField, last_named, option_fields, spelled

BEST = "budget"
SHARED = ("scheme",)  # fields that the shared options give
FIRST = (BEST, "mixquant", "ptilmpq", "uniform")  # in this order an option that several have chooses


def chosen_allocator(args: Sequence[str], own: Iterable[str], defaults: Sequence[str] = ()) -> tuple[str, Any]:
    """The name and class of the allocator that these words ask for.

    `-a NAME` says it. Otherwise an option that belongs to one allocator alone chooses that one; of several that have
    all the options given, Budget is taken; `--bits 4`, one width, is a uniform plan.

    Args:
        args: The words after the command's name.
        own: The command's own options, which choose nothing.
        defaults: Words that a file of defaults adds; they choose where `args` do not.

    Raises:
        PluginError: The allocator is not installed, or cannot be imported.
        click.UsageError: The options belong to different allocators.
    """
    named = last_named(args, "--allocator", "-a") or last_named(defaults, "--allocator")
    if named is not None:
        return named, registry.load("allocators", named)
    choose_nothing = {*own, *scheme_options()}
    if defaults and not any(owners_of(word) for word in _said(args) if word not in choose_nothing):
        return chosen_allocator([*args, *defaults], own)
    said = {word: value for word, value in _said(args).items() if word not in choose_nothing}
    options = _options_of(FIRST)
    if not options.known >= said.keys():  # a package's own allocator is imported only where ours leave an option open
        options = _options_of((*FIRST, *(name for name in registry.names("allocators") if name not in FIRST)))
    relevant = {word: value for word, value in said.items() if word in options.known}
    having = [name for name, kinds in options.kinds.items() if kinds.keys() >= relevant.keys()]
    if not having:
        raise click.UsageError(_of_several(relevant, options))
    fitting = [name for name in having if _fits(options.kinds[name], relevant)] or having
    return fitting[0], registry.load("allocators", fitting[0])


@dataclasses.dataclass(frozen=True)
class _Options:
    """The options of several allocators: name -> option -> its field's type."""

    kinds: Mapping[str, Mapping[str, Any]]

    @property
    def known(self) -> set[str]:
        return {option for kinds in self.kinds.values() for option in kinds}


def _options_of(names: Iterable[str]) -> _Options:
    """Those of the allocators that can be loaded; whatever is wrong with another, it was not asked for."""
    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        with suppress(PluginError):
            fields = option_fields(registry.load("allocators", name), f"allocators: {name!r}", SHARED)
            found[name] = {option: field.kind.type for field in fields for option in _spellings(field)}
    return _Options(found)


def _spellings(field: OptionField) -> tuple[str, ...]:
    """The options of a field: of a flag two."""
    return (field.option, field.kind.opposite(field.name)) if field.kind.type is bool else (field.option,)


def scheme_options() -> Iterable[str]:
    """The options that the fields of this package's schemes become."""
    from ..plans.schemes import SCHEMES

    return (spelled(field.name) for scheme in SCHEMES.values() for field in dataclasses.fields(scheme))


def _said(args: Sequence[str]) -> dict[str, str | None]:
    """The long options among the words, each with the value that follows it, None for a flag at the end."""
    said: dict[str, str | None] = {}
    for position, word in enumerate(args):
        if word == "--":
            break
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            said[option] = value if equals else next(iter(args[position + 1 :]), None)
    return said


def _fits(kinds: Mapping[str, Any], said: Mapping[str, str | None]) -> bool:
    """Whether fields that take one number get one, and those that take a list get a list."""
    for option, value in said.items():
        one = as_integer(value) is not None if value is not None else False
        if (kinds[option] is int and not one) or (kinds[option] is tuple and one):
            return False
    return True


def owners_of(option: str) -> list[str]:
    """The installed allocators that have an option, sorted."""
    return [name for name, kinds in _options_of(registry.names("allocators")).kinds.items() if option in kinds]


def every_option() -> set[str]:
    """The options that the fields of any installed allocator become."""
    return _options_of(registry.names("allocators")).known


def _of_several(said: Mapping[str, str | None], options: _Options) -> str:
    owners = {word: [name for name, kinds in options.kinds.items() if word in kinds] for word in said}
    belong = "; ".join(f"{word} belongs to {', '.join(names)}" for word, names in owners.items())
    return f"no allocator has all of {', '.join(said)}: {belong}. Leave one out, or name the allocator with -a"
