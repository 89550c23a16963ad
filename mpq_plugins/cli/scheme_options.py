"""The options that describe a measurement: what of the source, and under which scheme, by the schemes' own fields."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import click

from ..errors import PluginError
from .field_options import OptionField, option_fields
from .help import SectionCommand
from .output import weights_option
from .types import Known

Command = TypeVar("Command", bound=Callable[..., Any])
REQUEST_NAMES = ("scheme_name", "skip", "only", "fold_bn", "weights", "already_quantized")
SCHEME_FIELDS_KEY = "mpq_plugins.scheme_fields"
NO_OPTIONS = ("name",)  # which --scheme gives


def known_schemes() -> Mapping[str, type]:
    """Every scheme by its name, but those that cannot be imported: whoever asks for one is told why."""
    from ..plans.scheme_names import scheme_class

    schemes: dict[str, type] = {}
    for name in _scheme_names():
        with suppress(PluginError):
            schemes[name] = scheme_class(name)
    return schemes


def _scheme_names() -> tuple[str, ...]:
    from ..plans.scheme_names import scheme_names

    return scheme_names()


class SchemeCommand(SectionCommand):
    """A command whose options include the fields of all schemes; a field that several have is one option."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, then the schemes', and --help."""
        given = super().get_params(ctx)
        if SCHEME_FIELDS_KEY not in ctx.meta:
            taken = {option for parameter in given for option in parameter.opts}
            ctx.meta[SCHEME_FIELDS_KEY] = list(_field_options(known_schemes(), taken))
        return [*given[:-1], *ctx.meta[SCHEME_FIELDS_KEY], given[-1]]


def request_values(values: dict[str, Any], ctx: click.Context | None = None) -> dict[str, Any]:
    """The values of these options, taken out of a command's, as `Request` takes them."""
    names = [str(option.name) for option in (ctx or click.get_current_context()).meta[SCHEME_FIELDS_KEY]]
    fields = {name: values.pop(name) for name in names}
    said = tuple((name, value) for name, value in fields.items() if value is not None)
    return {"scheme_fields": said, **{name: values.pop(name) for name in REQUEST_NAMES}}


def _field_options(schemes: Mapping[str, type], taken: set[str]) -> Iterator[click.Option]:
    """An option for each field; which schemes have it is said where not all do."""
    owners: dict[str, list[str]] = {}
    fields: dict[str, OptionField] = {}
    for name, scheme in schemes.items():
        for field in option_fields(scheme, f"schemes: {name!r}", NO_OPTIONS):
            if field.option in taken:
                raise PluginError(
                    f"schemes: {name!r} has a field {field.name!r}, but {field.option} is the command's own"
                )
            fields.setdefault(field.name, field)
            owners.setdefault(field.name, []).append(name)
    for name, field in fields.items():
        yield field.made("Scheme", said_of="" if len(owners[name]) == len(schemes) else ", ".join(owners[name]))


def scheme_options(command: Command) -> Command:
    """The options that say what is measured, and under which scheme; of a SchemeCommand."""
    for option in reversed(
        (
            click.option(
                "--scheme",
                "scheme_name",
                type=Known(_scheme_names),
                help="How weights become codes (default: the allocator's, or affine).",
            ),
            click.option(
                "--skip",
                multiple=True,
                metavar="GLOB",
                help="Leave these layers alone; repeatable. A glob, re:REGEX, or in language models role:embeddings, "
                "role:lm_head or role:routers.",
            ),
            click.option(
                "--only",
                multiple=True,
                metavar="GLOB",
                help="Take only these layers; repeatable. Also those that checkpoints' plans leave alone: role:lora, "
                "role:fragile.",
            ),
            weights_option,
            click.option(
                "--already-quantized",
                is_flag=True,
                default=None,
                help="Of a checkpoint whose layers are packed already, plan what is left in floating point.",
            ),
            click.option(
                "--fold-bn",
                type=click.Choice(["auto", "yes", "no"]),
                help="Measure conv weights with BatchNorm folded in; auto: a module's, per tensor.",
            ),
        )
    ):
        command = option(command)
    return command
