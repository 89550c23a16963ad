"""Defaults for options from `mpq.toml`, or from [tool.mpq] in pyproject.toml: of all commands, and of each.

average-bits = 3            # wherever a command has the option
[sweep]
average-bits = [2, 3, 4]    # of one command
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from ..common.checks import shown
from ..common.files import exists
from ..common.text import did_you_mean
from ..errors import SettingError
from .types import IntegerList

FILE, PROJECT = "mpq.toml", "pyproject.toml"
OURS = b"tool.mpq"
KEY = "mpq_plugins.defaults"
IGNORED_KEY = "mpq_plugins.ignored_defaults"  # options of the file that the command line's replace


@dataclass(frozen=True)
class Defaults:
    """What a file says: option (without dashes) -> value, for every command and for single ones."""

    path: Path | None = None
    common: Mapping[str, Any] = field(default_factory=dict)
    commands: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, command: str) -> dict[str, Any]:
        """The values for a command; its own go before those of all."""
        return {**self.common, **self.commands.get(command, {})}

    def words(self, command: str) -> list[str]:
        """The same as words of the command line, which may choose an allocator."""
        return [word for name, value in self.of(command).items() for word in (f"--{name}", _text(value))]


def read_defaults(folder: Path, commands: Iterable[str]) -> Defaults:
    """Read the nearest file of defaults, in a folder or above it.

    Args:
        folder: Where to begin, the working directory.
        commands: The names of all commands, which are the names of the file's tables.

    Returns:
        What it says; nothing where there is no such file.

    Raises:
        SettingError: The file is no TOML, has a table for no command or a value that no option takes, or both files
            say something.
    """
    for place in (folder, *folder.parents):
        found = [(path, said) for path in (place / FILE, place / PROJECT) if (said := _said(path)) is not None]
        if len(found) > 1:
            raise SettingError(f"{found[0][0]}: {found[1][0]} has a [tool.mpq] too; keep one of them")
        if found:
            return _checked(*found[0], list(commands))
    return Defaults()


def long_options(parameters: Iterable[click.Parameter]) -> dict[str, click.Parameter]:
    """The parameters by their long options, as a file names them: without dashes."""
    return {
        option.removeprefix("--"): parameter
        for parameter in parameters
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--")
    }


def default_map(defaults: Defaults, command: click.Command, ctx: click.Context) -> dict[str, Any]:
    """The defaults of a command by the names of its parameters, as click takes them."""
    options = long_options(command.get_params(ctx))
    return {
        str(options[key].name): _for(options[key], key, value)
        for key, value in defaults.of(str(ctx.info_name)).items()
        if key in options and f"--{key}" not in ctx.meta.get(IGNORED_KEY, ())
    }


def _said(path: Path) -> Mapping[str, Any] | None:
    """What a file says of us; None where it is not there or says nothing."""
    if not exists(path) or not path.is_file():
        return None
    try:
        document = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        if path.name == PROJECT and OURS not in path.read_bytes():
            return None  # whatever is wrong with it, it says nothing to us
        raise SettingError(f"{path}: is no TOML ({error})") from error
    if path.name == FILE:
        return document
    said = document.get("tool", {})
    return said.get("mpq") if isinstance(said, dict) else None


def _checked(path: Path, said: Any, commands: list[str]) -> Defaults:
    if not isinstance(said, dict):
        raise SettingError(f"{path}: tool.mpq: {shown(said)} is not allowed; a table, [tool.mpq]")
    tables = {name: value for name, value in said.items() if isinstance(value, dict)}
    for name, table in tables.items():
        if name not in commands:
            raise SettingError(
                f"{path}: [{name}]: there is no such command, and an option takes no table"
                f"{did_you_mean(name, commands)}"
            )
        _check_values(path, f"[{name}] ", table)
    common = {name: value for name, value in said.items() if name not in tables}
    _check_values(path, "", common)
    return Defaults(path, common, tables)


def _check_values(path: Path, where: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key == "force":
            raise SettingError(f"{path}: {where}force: is said on the command line alone, for what it is meant for")
        each = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str | int | float | bool) for one in each):
            raise SettingError(
                f"{path}: {where}{key}: {shown(value)} is not allowed; a text, a number, true, or a list"
            )


def _for(parameter: click.Parameter, key: str, value: Any) -> Any:
    """A value as the parameter takes it from a command line."""
    if isinstance(parameter, click.Option) and parameter.count:
        return int(value) if isinstance(value, bool) else value
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return value is not (f"--{key}" in parameter.secondary_opts) if isinstance(value, bool) else value
    if isinstance(parameter.type, IntegerList):  # one list of integers, as 2,4,8 is on the command line
        return [_text(value)] if parameter.multiple else _text(value)
    if parameter.multiple:
        return [_text(one) for one in value] if isinstance(value, list) else [_text(value)]
    return _text(value)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
