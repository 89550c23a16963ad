"""A frozen dataclass's fields as command-line options: an allocator's, or a scheme's.

A field's annotation says it all: `Annotated[type, "text"]` gives the help, a Literal what is allowed, and a second text
of a flag what its opposite is called.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from ..common.text import printable
from ..errors import PluginError
from .help import SectionOption
from .types import IntegerList, NumberList, OneOf

NAMES = click.types.StringParamType()  # of a tuple of strings: repeated, and one value all together
SINGLE: dict[Any, click.ParamType[Any]] = {
    int: click.INT, float: click.FLOAT, str: click.STRING, tuple: IntegerList(), list: NAMES,
}  # fmt: skip
FLAGS = "hqv"  # short options without a value, which may stand before another in one word
LONGEST_METAVAR = 24  # beyond it an option's values are listed in its text
REMEDY = "Use it from Python, or rename the field."


@dataclass(frozen=True)
class FieldKind:
    """What a field's annotation says.

    type: bool, int, float or str; tuple, of integers; list, of names; None for what no option can give. texts: the
    help and, of a flag, the opposite's name; allowed: of a str, the values there are, of a flag, one beside yes and no,
    whose own flag two more texts name and explain.
    """

    type: Any
    texts: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()

    def opposite(self, name: str) -> str:
        """The flag that turns off a field of this name."""
        return spelled(self.texts[1] if len(self.texts) > 1 else f"no-{name}")

    @property
    def word(self) -> str:
        """The parameter that gives a flag's third value; "" where there is none."""
        return self.texts[2].replace("-", "_") if self.type is bool and self.allowed else ""

    def fits(self, other: "FieldKind") -> bool:
        """Whether an option of the other kind gives what a field of this one takes: the same values, or any text."""
        return self.type is other.type and self.allowed in ((), other.allowed)


@dataclass(frozen=True)
class OptionField:
    """A field that an option gives: its name, kind, default in words ("" where there is none to say), and help."""

    name: str
    kind: FieldKind
    required: bool
    default: str
    text: str

    @property
    def option(self) -> str:
        """As it is written on the command line, `--group-size`."""
        return spelled(self.name)

    def made(self, section: str, *, said_of: str = "", several: bool = False, enforced: bool = True) -> click.Option:
        """The option, in this section of the help; said_of: what has the field, before its text.

        several: whether it takes several values, for a plan each. enforced: whether a command without what is required
        is refused.
        """
        required = self.required and enforced
        head = f"[{said_of}] " if said_of else ""
        more = "required" if self.required else self.default
        allowed = f"|{'|'.join(self.kind.allowed)}|"
        long = len(allowed) > LONGEST_METAVAR
        text = f"{self.text}: {', '.join(self.kind.allowed)}" if long else self.text
        shown = head + "; ".join(part for part in (text, more) if part)
        if self.kind.type is bool:
            flags = f"{self.option}/{self.kind.opposite(self.name)}"
            return SectionOption([flags, self.name], default=None, required=required, help=shown, section=section)
        if self.kind.type is list:
            shown, several = f"{shown}; repeatable", True
        return SectionOption(
            [self.option, self.name], type=self._type(several), multiple=several, required=required, help=shown,
            section=section, metavar="NAME" if long else None,
        )  # fmt: skip

    def word_made(self, section: str, said_of: str = "") -> click.Option | None:
        """The option for a flag's third value, where it has one."""
        if not self.kind.word:
            return None
        head = f"[{said_of}] " if said_of else ""
        names = [spelled(self.kind.word), self.kind.word]
        return SectionOption(names, is_flag=True, default=None, help=head + self.kind.texts[3], section=section)

    def _type(self, several: bool) -> click.ParamType[Any]:
        if self.kind.allowed:
            return OneOf(self.kind.allowed)
        kind = SINGLE[self.kind.type]
        return NumberList(kind) if several and self.kind.type in (int, float) else kind


def option_fields(cls: type, where: str, without: Iterable[str] = ()) -> Iterator[OptionField]:
    """The fields of a dataclass that its call takes, but `without` these.

    Raises PluginError, saying `where`, for what is no dataclass or needs a field that no option can give.
    """
    if not dataclasses.is_dataclass(cls):
        raise PluginError(f"{where} is no dataclass, so it has no fields to turn into options")
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        if not field.init or field.name in without:
            continue
        kind = field_kind(hints[field.name])
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if kind.type is None:
            if required:
                raise PluginError(f"{where} needs {field.name!r}, whose type no option can give")
            continue
        default = "" if required else default_words(field.default, field.name, kind)
        yield OptionField(field.name, kind, required, default, kind.texts[0] if kind.texts else "")


def default_words(default: Any, name: str, kind: FieldKind) -> str:
    """`default --no-parts`: a default as the help says it; empty where there is none to say."""
    return "" if default in (None, ()) else f"default {_shown(default, name, kind)}"


def taken_by(parameters: Iterable[click.Parameter], whose: str) -> dict[str, str]:
    """What is taken on the command line, spelled or as a parameter's name, and what to say of it.

    whose: `the command's`.
    """
    return {
        word: f"{max(parameter.opts, key=len)} is {whose} own" for parameter in parameters for word in _words(parameter)
    }


def check_free(where: str, field: str, option: click.Option, taken: Mapping[str, str]) -> None:
    """Raise PluginError if the option of a field would be another one too."""
    for word in _words(option):
        if word in taken:
            raise PluginError(f"{where} has a field {field!r}, but {taken[word]}. {REMEDY}")


def last_named(args: Sequence[str], long: str, short: str | None = None) -> str | None:
    """The last value given to an option, in any of the spellings click takes; None where there is none."""
    named = None
    for position, argument in enumerate(args):
        if argument in (long, short) and position + 1 < len(args):
            named = args[position + 1]
        elif argument.startswith(f"{long}="):
            named = argument.partition("=")[2]
        elif short and (bundled := re.fullmatch(rf"-[{FLAGS}]*{short[1]}(.*)", argument)) is not None:
            named = bundled[1] or next(iter(args[position + 1 :]), named)
    return named


def spelled(name: str) -> str:
    """A field's name as an option, `--group-size`."""
    return f"--{name.replace('_', '-')}"


def field_kind(hint: Any) -> FieldKind:
    """What an annotation says, Optional and Annotated unwrapped."""
    texts: tuple[str, ...] = ()
    while True:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is typing.Annotated:
            hint = arguments[0]
            texts = texts or tuple(printable(note) for note in arguments[1:] if isinstance(note, str))
        elif origin in (typing.Union, types.UnionType):
            inner = [argument for argument in arguments if argument is not type(None)]
            if len(inner) == 2 and inner[0] is bool and typing.get_origin(inner[1]) is typing.Literal:
                return FieldKind(bool, texts, typing.get_args(inner[1]) if len(texts) == 4 else ())
            hint = inner[0] if len(inner) == 1 else str if str in inner else None
        else:
            break
    if origin is typing.Literal and all(isinstance(value, str) for value in arguments):
        return FieldKind(str, texts, arguments)
    if origin is tuple:
        inside = set(arguments) - {...}
        return FieldKind(tuple if inside == {int} else list if inside == {str} else None, texts)
    return FieldKind(hint if hint in (bool, int, float, str) else None, texts)


def _words(parameter: click.Parameter) -> tuple[str, ...]:
    return (*parameter.opts, *parameter.secondary_opts, str(parameter.name))


def _shown(default: Any, name: str, kind: FieldKind) -> str:
    """A default as it would be given; of a flag the one of the two that it is."""
    if kind.type is bool:
        return spelled(kind.word if default in kind.allowed else name) if default else kind.opposite(name)
    return printable(",".join(map(str, default)) if isinstance(default, tuple) else default)
