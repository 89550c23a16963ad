"""The options that describe a measurement: what of the source, and under which scheme, by the schemes' own fields."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from ..common.outsiders import outsiders
from ..common.registry import described
from ..errors import PluginError, SettingError
from .field_options import REMEDY, OptionField, check_free, default_words, last_named, option_fields, spelled, taken_by
from .help import SectionCommand
from .output import weights_option
from .types import Known

if TYPE_CHECKING:  # `mpq --help` should not wait for it
    from ..plans.scheme import Scheme

Command = TypeVar("Command", bound=Callable[..., Any])
REQUEST_NAMES = ("scheme_name", "skip", "only", "fold_bn", "weights", "already_quantized")
SCHEME_FIELDS_KEY = "mpq_plugins.scheme_fields"
OPTIONS_KEY = "mpq_plugins.field_options"
NAMED_KEY = "mpq_plugins.named_scheme"
SECTION = "Scheme"
NO_OPTIONS = ("name",)  # which --scheme gives
# In the help where their scheme is named, for a page has so many lines.
RARE = ("full_range", "scale_dtype", "share", "stochastic")


def _names() -> Iterable[str]:
    from ..plans.scheme_names import scheme_names

    return scheme_names()


@dataclass(frozen=True)
class SchemeFields:
    """The fields that options give, by name, and the schemes that have each; some of several packages' schemes.

    refused: schemes whose fields cannot be options beside these, and why, which is said of one that is asked for.
    """

    fields: dict[str, OptionField] = field(default_factory=dict)
    owners: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def add(self, names: Iterable[str], taken: Mapping[str, str]) -> None:
        """Take in schemes whose fields may be options, beside what is taken, or note why they cannot be."""
        for name in names:
            try:
                added = self._fields_of(name, {**taken, **taken_by(self.options(), "another scheme's")})
            except PluginError as error:
                self.refused[name] = str(error)
                continue
            for each in added:
                self.fields.setdefault(each.name, each)
                self.owners.setdefault(each.name, []).append(name)

    def options(self, shown: "Scheme | None" = None, *, named: bool = False) -> list[click.Option]:
        """An option for each field; which schemes have it is said where few do. None of them has to be given.

        shown: the scheme whose options are listed in the help, with what it has for each as the default; named: whether
        it was asked for, so that all of them are.
        """
        schemes = {owner for owners in self.owners.values() for owner in owners}
        made = []
        for name, each in self.fields.items():
            owners = self.owners[name]
            if shown is not None and hasattr(shown, name):
                each = replace(each, default=default_words(getattr(shown, name), name, each.kind))
            said_of = "" if 2 * len(owners) >= len(schemes) else ", ".join(owners)
            word = each.word_made(SECTION, said_of)
            for option in (each.made(SECTION, said_of=said_of, enforced=False), *([word] if word else [])):
                option.hidden = shown is not None and (shown.name not in owners or (not named and option.name in RARE))
                made.append(option)
        return made

    def said(self, values: dict[str, Any], ctx: click.Context) -> dict[str, Any]:
        """The fields that these options say, taken out of a command's. Raises SettingError where two exclude others."""
        said = {}
        for name, each in self.fields.items():
            value, word = values.pop(name), values.pop(each.kind.word, None)
            if word and value is not None:
                value, word = _one_of(name, each, value, ctx)
            value = each.kind.allowed[0] if word else value
            if value != (() if each.kind.type is list else None):
                said[name] = value
        return said

    def _fields_of(self, name: str, taken: Mapping[str, str]) -> list[OptionField]:
        """Those of a scheme. Raises PluginError where one of them is another's option, or whatever is wrong with it."""
        from ..plans.scheme_names import scheme_class

        scheme = scheme_class(name)
        where = described("schemes", scheme)
        with outsiders(lambda said: PluginError(f"{where} cannot be made into options ({said})")):
            given = list(option_fields(scheme, where, NO_OPTIONS))
            for each in given:
                shared = self.fields.get(each.name)
                if shared is None:
                    check_free(where, each.name, each.made(SECTION), taken)
                elif not each.kind.fits(shared.kind):
                    raise PluginError(
                        f"{where} has a field {each.name!r}, but {shared.option} takes other values for "
                        f"{', '.join(self.owners[each.name])}. {REMEDY}"
                    )
        return given


class SchemeCommand(SectionCommand):
    """A command whose options include the fields of all schemes; a field that several have is one option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Look first which scheme is named: its fields come before those of other packages' other schemes."""
        named = ctx.meta[NAMED_KEY] = last_named(args, "--scheme")
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if named in ctx.meta[SCHEME_FIELDS_KEY].refused:
                raise PluginError(ctx.meta[SCHEME_FIELDS_KEY].refused[named]) from error
            raise

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, then the schemes' and any others, and --help."""
        given = super().get_params(ctx)
        if OPTIONS_KEY not in ctx.meta:
            ctx.meta[OPTIONS_KEY] = self._options(ctx, given)
        return [*given[:-1], *ctx.meta[OPTIONS_KEY], given[-1]]

    def usual_scheme(self, ctx: click.Context) -> "Scheme":
        """The scheme that is measured under where none is named, whose options the help lists."""
        from ..plans.affine import Affine

        return Affine(granularity="per_channel", range="mse")

    def more_options(self, ctx: click.Context, taken: Mapping[str, str]) -> Iterable[click.Option]:
        """Options beside these, none of them taken; they come before those of other packages' schemes."""
        return ()

    def _options(self, ctx: click.Context, given: Iterable[click.Parameter]) -> list[click.Option]:
        from ..plans.schemes import SCHEMES

        schemes = SchemeFields()
        taken = taken_by(given, "the command's")
        schemes.add(SCHEMES, taken)
        more = list(self.more_options(ctx, {**taken, **taken_by(schemes.options(), "the command's")}))
        taken |= taken_by(more, "the allocator's")
        named = ctx.meta.get(NAMED_KEY)
        foreign = [name for name in _names() if name not in SCHEMES]
        schemes.add(sorted(foreign, key=lambda name: name != named), taken)
        ctx.meta[SCHEME_FIELDS_KEY] = schemes
        shown = _made_of(named) if named else self.usual_scheme(ctx)
        return [*schemes.options(shown, named=bool(named)), *more]


def _one_of(name: str, flag: OptionField, value: Any, ctx: click.Context) -> tuple[Any, bool]:
    """Of a flag and its third value's the one that counts: the command line's, or, said together, that which says more.

    Raises SettingError where both are said together and exclude each other.
    """
    places = [ctx.get_parameter_source(each) is ParameterSource.COMMANDLINE for each in (name, flag.kind.word)]
    if places == [True, False]:
        return value, False
    if places[0] == places[1] and not value:
        words = f"{flag.kind.opposite(name)} and {spelled(flag.kind.word)}"
        raise SettingError(f"{name}: {words} exclude each other; give one")
    return value, True


def _made_of(name: str) -> "Scheme | None":
    """A scheme by its name, with its defaults; None for one that cannot be made without being told more."""
    from ..plans.scheme_names import scheme_class

    made = None
    with suppress(Exception):  # another package's raises what it likes, which is said where it is made
        made = scheme_class(name)()
    return made


def request_values(values: dict[str, Any], ctx: click.Context | None = None) -> dict[str, Any]:
    """The values of these options, taken out of a command's, as `Request` takes them."""
    ctx = ctx or click.get_current_context()
    schemes: SchemeFields = ctx.meta[SCHEME_FIELDS_KEY]
    said = schemes.said(values, ctx)
    others = {name: values.pop(name) for name in REQUEST_NAMES}
    words = [schemes.fields[name].kind.word for name in said]
    sources = {ctx.get_parameter_source(name) for name in (*said, *filter(None, words), *others)}
    from_file = ParameterSource.DEFAULT_MAP in sources and ParameterSource.COMMANDLINE not in sources
    return {"scheme_fields": tuple(said.items()), "refused_schemes": schemes.refused, "from_file": from_file, **others}


def scheme_options(command: Command) -> Command:
    """The options that say what is measured, and under which scheme; of a SchemeCommand."""
    for option in reversed(
        (
            click.option(
                "--scheme",
                "scheme_name",
                type=Known(_names),
                metavar="NAME",
                help="affine, piecewise, codebook, entropy_coded; more: --scheme NAME -h.",
            ),
            click.option(
                "--skip",
                multiple=True,
                metavar="GLOB",
                help="Layers to leave alone, by glob, re:REGEX or role:lm_head; repeatable.",
            ),
            click.option(
                "--only",
                multiple=True,
                metavar="GLOB",
                help="Layers to take, and no others, such as role:lora; repeatable.",
            ),
            weights_option,
            click.option(
                "--already-quantized",
                is_flag=True,
                default=None,
                help="Of a checkpoint packed already, plan what is left in floating point.",
            ),
            click.option(
                "--fold-bn",
                type=click.Choice(["auto", "yes", "no"]),
                help="Fold BatchNorm into convolutions first; auto: a module's, per tensor.",
            ),
        )
    ):
        command = option(command)
    return command
