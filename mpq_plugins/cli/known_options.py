"""Whether what a file of defaults names are options of some command, with those that fields of allocators become."""

from collections.abc import Mapping
from contextlib import suppress

import click

from ..common.text import did_you_mean
from ..errors import PluginError, SettingError
from .allocator_options import AllocatorCommand
from .chosen import owners_of
from .defaults import Defaults, long_options
from .field_options import option_fields
from .scheme_options import NO_OPTIONS, SchemeCommand


def check_known(defaults: Defaults, commands: Mapping[str, click.Command]) -> None:
    """Refuse a name that is no option: of the command whose table it is in, or of any.

    Raises:
        SettingError: It names the file, the table, the option, and the one that was perhaps meant.
    """
    known = {name: _options(command) for name, command in commands.items()}
    for name, values in defaults.commands.items():
        for key in values:
            if key not in known[name] and not (isinstance(commands[name], AllocatorCommand) and owners_of(f"--{key}")):
                raise SettingError(
                    f"{defaults.path}: [{name}] {key}: `mpq {name}` has no option --{key}"
                    f"{did_you_mean(key, known[name])}"
                )
    every = {option for options in known.values() for option in options}
    for key in defaults.common:
        if key not in every and not owners_of(f"--{key}"):
            raise SettingError(f"{defaults.path}: {key}: no command has an option --{key}{did_you_mean(key, every)}")


def _options(command: click.Command) -> set[str]:
    """The options of a command without their dashes, those of schemes' fields too, but no allocator's."""
    own = {*long_options(command.params)}
    return own | (_scheme_options() if isinstance(command, SchemeCommand) else set())


def _scheme_options() -> set[str]:
    from ..plans.scheme_names import scheme_class, scheme_names

    found: set[str] = set()
    for name in scheme_names():
        with suppress(PluginError):  # whatever is wrong with another package's
            for field in option_fields(scheme_class(name), f"schemes: {name!r}", NO_OPTIONS):
                word = field.word_made("")
                found |= {*long_options([field.made(""), *([word] if word else [])])}
    return found
