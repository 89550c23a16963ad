"""From words on the command line to sources, schemes and tables."""

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..common.files import exists
from ..common.outsiders import contained, outsiders
from ..errors import SourceError

if TYPE_CHECKING:
    from torch import nn

PRINTED = 128  # bits of a number; of thousands of digits Python makes no text
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Source:
    """What a word on the command line names: looked at once, and handed on.

    weights: the module that a factory made, or the path of a checkpoint or table.
    """

    text: str
    kind: Literal["table", "module", "checkpoint"]
    weights: "Path | nn.Module"

    @property
    def is_table(self) -> bool:
        """Whether it is measured already."""
        return self.kind == "table"

    @property
    def module(self) -> "nn.Module | None":
        """The module that it is."""
        return None if isinstance(self.weights, Path) else self.weights

    @property
    def path(self) -> Path:
        """Where the checkpoint or table is."""
        return self.weights if isinstance(self.weights, Path) else Path(self.text)


def resolve_source(text: str) -> Source:
    """A table, a checkpoint, or the module that `package.module:factory` returns. Raises SourceError."""
    from ..plans.table_file import is_table

    path = Path(text)
    if FACTORY.fullmatch(text) and not exists(path):
        return Source(text, "module", make_module(text))
    return Source(text, "table" if is_table(path) else "checkpoint", path)


def source_name(text: str) -> str:
    """What a title calls a source: a file's name without its ending, or a factory's."""
    return text.rpartition(":")[2] if FACTORY.fullmatch(text) else Path(text).stem


def make_module(text: str) -> "nn.Module":
    """The module that `package.module:factory` returns, in evaluation mode, as it will run. Raises SourceError."""
    from torch import nn

    factory = named_function(text)
    with outsiders(lambda said: SourceError(f"{text}: the factory cannot be called ({said})")):
        made = factory()
    if not isinstance(made, nn.Module):
        raise SourceError(f"{text}: returned a {type(made).__name__}; a torch.nn.Module is needed")
    with outsiders(lambda said: SourceError(f"{text}: returned a module that cannot be looked into ({said})")):
        made.eval().state_dict()  # one that contains itself ends here
        list(made.named_modules())
    return made


def named_function(text: str) -> Callable[..., Any]:
    """What `package.module:function` names. Raises SourceError."""
    if not FACTORY.fullmatch(text):
        raise SourceError(
            f"{text}: names no function; write package.module:function as Python imports it, mine:score for a function "
            "score in mine.py here"
        )
    module_name, _, name = text.partition(":")
    with outsiders(lambda said: SourceError(f"{text}: the function cannot be found ({said})")), _importing_from_here():
        function = getattr(importlib.import_module(module_name), name)
    if not callable(function):
        raise SourceError(f"{text}: is a {type(function).__name__}; a function is needed")
    return contained(function)


@contextmanager
def _importing_from_here() -> Iterator[None]:
    """As `python -m` does, so that a user's own file is found."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with suppress(ValueError):  # what was imported may have changed the path, too
            sys.path.remove(here)


def named_files(values: Mapping[str, Any]) -> list[str]:
    """Of an allocator's options, those that name files that are there, such as a table of latencies."""
    given = [
        value
        for given_value in values.values()
        for value in (given_value if isinstance(given_value, list | tuple) else (given_value,))
    ]
    return [value for value in given if isinstance(value, str) and exists(Path(value))]
