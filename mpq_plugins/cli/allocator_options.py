"""An allocator's fields as command-line options, so that a plugin's allocator gets its own without a line here."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from ..common import registry
from ..common.outsiders import outsiders
from ..common.text import did_you_mean, printable
from ..errors import PluginError, SettingError
from .chosen import SHARED, chosen_allocator, every_option, owners_of
from .defaults import IGNORED_KEY, KEY, Defaults
from .field_options import NAMES, check_free, option_fields, spelled
from .scheme_options import SchemeCommand
from .types import NumberList, installed

if TYPE_CHECKING:  # `mpq --help` should not wait for it
    from ..plans.scheme import Scheme

ALLOCATOR_KEY = "mpq_plugins.allocator"
NAME_KEY = "mpq_plugins.allocator_name"
FIELDS_KEY = "mpq_plugins.fields"
SAID_KEY = "mpq_plugins.said"
MOST_COMBINATIONS = 10_000

allocator_option = click.option(
    "-a",
    "--allocator",
    type=installed("allocators"),
    metavar="NAME",
    help="How widths are decided (default: by the options, or budget).",
)


class AllocatorCommand(SchemeCommand):
    """A command whose options include the fields of the allocator that --allocator names, or that they belong to."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Look the allocator up first, for it decides which options there are."""
        own = [option for parameter in self.params for option in (*parameter.opts, *parameter.secondary_opts)]
        defaults = ctx.meta.get(KEY, Defaults()).words(str(ctx.info_name))
        name, ctx.meta[ALLOCATOR_KEY] = chosen_allocator(args, own, defaults)
        ctx.meta[NAME_KEY] = name
        ctx.meta[SAID_KEY] = {word.partition("=")[0] for word in args}
        one_of = [spelled(field) for field in getattr(ctx.meta[ALLOCATOR_KEY], "one_of", ())]
        if any(word.partition("=")[0] in one_of for word in args):  # another limit is instead of the file's, not beside
            ctx.meta[IGNORED_KEY] = one_of
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            owners = owners_of(error.option_name)
            if not owners and (near := did_you_mean(error.option_name, every_option())):
                raise click.UsageError(f"No such option '{error.option_name}'{near}") from error
            if not owners:
                raise
            raise click.UsageError(
                f"No such option '{error.option_name}' for the allocator {name}; it belongs to "
                f"{', '.join(owners)}: add -a {owners[0]}"
            ) from error

    def usual_scheme(self, ctx: click.Context) -> "Scheme":
        """The allocator's, if it asks for one, or the plain one."""
        from ..plans.affine import Affine
        from ..plans.scheme import Scheme

        allocator: Any = ctx.meta.get(ALLOCATOR_KEY)
        scheme = None
        with suppress(Exception):  # an allocator that needs its options to be made
            scheme = allocator(**getattr(allocator, "usual", {})).needs.scheme
        return scheme if isinstance(scheme, Scheme) else Affine()

    def more_options(self, ctx: click.Context, taken: Mapping[str, str]) -> Iterable[click.Option]:
        """The allocator's."""
        if NAME_KEY not in ctx.meta:
            return ()
        name, allocator = ctx.meta[NAME_KEY], ctx.meta[ALLOCATOR_KEY]
        with outsiders(lambda said: PluginError(f"allocators: {name!r} cannot be made into options ({said})")):
            ctx.meta[FIELDS_KEY] = list(_field_options(name, allocator, taken, ctx.meta.get(SAID_KEY, ())))
        return ctx.meta[FIELDS_KEY]  # type: ignore[no-any-return]


def allocators_from(
    ctx: click.Context, values: dict[str, Any], scheme: Any, grid: Mapping[str, Sequence[Any]] | None = None
) -> list[Any]:
    """The allocators the options describe: one, or one per combination where options have several values.

    Where none has, and `grid` is given, the fields it names take its values unless the options say one. Of an
    allocator that needs one of several fields (`one_of`), `grid` and what is `usual` are taken where none is said.
    """
    allocator = ctx.meta[ALLOCATOR_KEY]
    options: list[click.Parameter] = ctx.meta[FIELDS_KEY]
    names = [str(option.name) for option in options]
    choices = {name: _given(option, values[name]) for option, name in zip(options, names, strict=True)}
    fixed = {"scheme": scheme} if any(field.name == "scheme" for field in dataclasses.fields(allocator)) else {}
    if usual_taken(ctx, values):
        choices |= grid or {name: (value,) for name, value in allocator.usual.items()}
    elif grid and all(len(choice) <= 1 for choice in choices.values()) and not getattr(allocator, "one_of", ()):
        (bare,) = _combined(allocator, choices, fixed)
        # A field that what was said leaves without a value is not the grid's to fill.
        unsaid = [name for name in grid if choices.get(name) == (_UNSAID,) and getattr(bare, name) is not None]
        choices |= {name: grid[name] for name in unsaid}
    if math.prod(len(choice) for choice in choices.values()) > MOST_COMBINATIONS:
        raise SettingError(f"options: more than {MOST_COMBINATIONS:,} combinations; give fewer values")
    try:
        return list(dict.fromkeys(_combined(allocator, choices, fixed)))  # the same value twice is one plan
    except TypeError as error:
        raise PluginError(
            f"{registry.described('allocators', allocator)} cannot be compared ({error}); it must be a frozen "
            "dataclass of plain values"
        ) from error


def usual_taken(ctx: click.Context, values: Mapping[str, Any]) -> bool:
    """Whether the allocator needs one of several fields, as Budget needs a limit, and the options say none of them."""
    one_of = getattr(ctx.meta[ALLOCATOR_KEY], "one_of", ())
    return bool(one_of) and all(values.get(name) in (None, ()) for name in one_of)


def _given(option: click.Parameter, value: Any) -> Sequence[Any]:
    """The values that an option was given, or that it was given none."""
    given: Sequence[Any] = value if option.multiple else () if value is None else (value,)
    if option.type is NAMES:
        given = [tuple(given)] if given else ()
    elif isinstance(option.type, NumberList):
        given = [number for numbers in given for number in numbers]
    return given or (_UNSAID,)


def _combined(allocator: Any, choices: Mapping[str, Sequence[Any]], fixed: dict[str, Any]) -> list[Any]:
    """An allocator for every combination of the choices."""
    made = []
    for combination in itertools.product(*choices.values()):
        said = {name: value for name, value in zip(choices, combination, strict=True) if value is not _UNSAID}
        with registry.at_work("allocators", allocator):
            made.append(_made(allocator, {**fixed, **said}))
    return made


def _made(allocator: Any, fields: Mapping[str, Any]) -> Any:
    try:
        return allocator(**fields)
    except TypeError as error:
        raise SettingError(f"allocator {allocator.name!r}: {error}") from error


_UNSAID = object()


def _field_options(
    name: str, allocator: Any, taken: Mapping[str, str], said: Collection[str]
) -> Iterator[click.Option]:
    """said: the options that were given, beside some of which the help lists more."""
    where = f"allocators: {name!r}"
    beside: Mapping[str, Sequence[str]] = getattr(allocator, "beside", {})
    hidden = {more for field, others in beside.items() if spelled(field) not in said for more in others}
    for field in option_fields(allocator, where, SHARED):
        option = field.made(f"Allocator {printable(name)}", several=True)
        check_free(where, field.name, option, taken)
        option.hidden = field.name in hidden
        yield option
