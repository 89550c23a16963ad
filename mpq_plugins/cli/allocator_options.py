"""An allocator's fields as command-line options, so that a plugin's allocator gets its own without a line here."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import click

from ..common import registry
from ..common.outsiders import outsiders
from ..common.text import printable
from ..errors import PluginError, SettingError
from .field_options import NAMES, check_free, last_named, option_fields, spelled
from .scheme_options import SchemeCommand
from .types import NumberList, installed

DEFAULT_ALLOCATOR = "mixquant"
ALLOCATOR_KEY = "mpq_plugins.allocator"
NAME_KEY = "mpq_plugins.allocator_name"
FIELDS_KEY = "mpq_plugins.fields"
MOST_COMBINATIONS = 10_000
SHARED = ("scheme",)  # fields that the shared options give

allocator_option = click.option(
    "-a",
    "--allocator",
    type=installed("allocators"),
    default=DEFAULT_ALLOCATOR,
    show_default=True,
    help="How widths are decided; `mpq plugins` lists them.",
)


class AllocatorCommand(SchemeCommand):
    """A command whose options include the fields of the allocator that --allocator names."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Look the allocator up first, for it decides which options there are."""
        name = last_named(args, "--allocator", "-a") or DEFAULT_ALLOCATOR
        ctx.meta[ALLOCATOR_KEY], ctx.meta[NAME_KEY] = registry.load("allocators", name), name
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            owners = [other for other in registry.names("allocators") if _has_field(other, error.option_name)]
            if not owners:
                raise
            raise click.UsageError(
                f"No such option '{error.option_name}' for the allocator {name}; it belongs to "
                f"{', '.join(owners)}: add -a {owners[0]}"
            ) from error

    def more_options(self, ctx: click.Context, taken: Mapping[str, str]) -> Iterable[click.Option]:
        """The allocator's."""
        if NAME_KEY not in ctx.meta:
            return ()
        name, allocator = ctx.meta[NAME_KEY], ctx.meta[ALLOCATOR_KEY]
        with outsiders(lambda said: PluginError(f"allocators: {name!r} cannot be made into options ({said})")):
            ctx.meta[FIELDS_KEY] = list(_field_options(name, allocator, taken))
        return ctx.meta[FIELDS_KEY]  # type: ignore[no-any-return]


def allocators_from(
    ctx: click.Context, values: dict[str, Any], scheme: Any, grid: Mapping[str, Sequence[Any]] | None = None
) -> list[Any]:
    """The allocators the options describe: one, or one per combination where options have several values.

    Where none has, and `grid` is given, the fields it names take its values unless the options say one.
    """
    allocator = ctx.meta[ALLOCATOR_KEY]
    options: list[click.Parameter] = ctx.meta[FIELDS_KEY]
    names = [str(option.name) for option in options]
    choices: list[Sequence[Any]] = []
    for option, name in zip(options, names, strict=True):
        given = values[name]
        if not option.multiple:
            given = () if given is None else (given,)
        if option.type is NAMES:
            given = [tuple(given)] if given else ()
        elif isinstance(option.type, NumberList):
            given = [number for numbers in given for number in numbers]
        choices.append(given or (_UNSAID,))
    fixed = {"scheme": scheme} if any(field.name == "scheme" for field in dataclasses.fields(allocator)) else {}
    if grid and all(len(choice) <= 1 for choice in choices):
        (bare,) = _combined(allocator, names, choices, fixed)
        for i, name in enumerate(names):
            # A field that what was said leaves without a value is not the grid's to fill.
            if name in grid and choices[i] == (_UNSAID,) and getattr(bare, name) is not None:
                choices[i] = grid[name]
    if math.prod(len(choice) for choice in choices) > MOST_COMBINATIONS:
        raise SettingError(f"options: more than {MOST_COMBINATIONS:,} combinations; give fewer values")
    try:
        return list(dict.fromkeys(_combined(allocator, names, choices, fixed)))  # the same value twice is one plan
    except TypeError as error:
        raise PluginError(
            f"{registry.described('allocators', allocator)} cannot be compared ({error}); it must be a frozen "
            "dataclass of plain values"
        ) from error


def _combined(
    allocator: Any, names: Sequence[str], choices: Sequence[Sequence[Any]], fixed: dict[str, Any]
) -> list[Any]:
    """An allocator for every combination of the choices."""
    made = []
    for combination in itertools.product(*choices):
        said = {name: value for name, value in zip(names, combination, strict=True) if value is not _UNSAID}
        with registry.at_work("allocators", allocator):
            made.append(_made(allocator, {**fixed, **said}))
    return made


def _made(allocator: Any, fields: Mapping[str, Any]) -> Any:
    try:
        return allocator(**fields)
    except TypeError as error:
        raise SettingError(f"allocator {allocator.name!r}: {error}") from error


_UNSAID = object()


def _has_field(name: str, option: str) -> bool:
    with suppress(PluginError):  # whatever is wrong with another allocator, this one was not asked for
        allocator = registry.load("allocators", name)
        fields = dataclasses.fields(allocator) if dataclasses.is_dataclass(allocator) else ()
        return option in {spelled(field.name) for field in fields}
    return False


def _field_options(name: str, allocator: Any, taken: Mapping[str, str]) -> Iterator[click.Option]:
    where = f"allocators: {name!r}"
    for field in option_fields(allocator, where, SHARED):
        option = field.made(f"Allocator {printable(name)}", several=True)
        check_free(where, field.name, option, taken)
        yield option
