"""From words on the command line to sources, schemes and tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..common.files import exists
from ..common.outsiders import outsiders
from ..errors import SettingError, SourceError
from .functions import named_function, names_function

if TYPE_CHECKING:
    from torch import nn

PRINTED = 128  # bits of a number; of thousands of digits Python makes no text


@dataclass(frozen=True)
class Source:
    """What a word on the command line names: looked at once, and handed on.

    weights: the module that a factory made, or the path of a checkpoint or table.
    """

    text: str
    kind: Literal["table", "types", "module", "checkpoint"]
    weights: "Path | nn.Module"

    @property
    def is_table(self) -> bool:
        """Whether it is measured already, at widths or as types."""
        return self.kind in ("table", "types")

    @property
    def has_types(self) -> bool:
        """Whether it is a table of types."""
        return self.kind == "types"

    @property
    def module(self) -> "nn.Module | None":
        """The module that it is."""
        return None if isinstance(self.weights, Path) else self.weights

    @property
    def path(self) -> Path:
        """Where the checkpoint or table is."""
        return self.weights if isinstance(self.weights, Path) else Path(self.text)


def resolve_source(text: str) -> Source:
    """A table, a checkpoint, or the module that a factory returns, `package.module:factory` or `file.py:factory`.

    Raises SourceError.
    """
    from ..plans.plan import is_plan
    from ..plans.table_file import is_table
    from ..plans.type_table import is_type_table

    path = Path(text)
    if names_function(text):
        return Source(text, "module", make_module(text))
    if is_plan(path):
        raise SourceError(f"{text}: is a plan, and a model or its weights are wanted; `mpq show {text}` shows it")
    if path.suffix == ".py" and path.is_file():
        raise SourceError(f"{text}: which function of it makes the model? Write {text}:NAME")
    if is_type_table(path):
        return Source(text, "types", path)
    return Source(text, "table" if is_table(path) else "checkpoint", path)


def check_order(plan: Path, source: str, usage: str) -> None:
    """Refuse a plan where the source belongs, and the other way round. Raises SettingError.

    usage: how the command is written, `mpq check PLAN SOURCE`.
    """
    from ..plans.plan import is_plan

    if is_plan(Path(source)) and not is_plan(plan):
        raise SettingError(f"arguments: {source} is a plan and {plan} is none, so they are swapped; write {usage}")


def source_name(text: str) -> str:
    """What a title calls a source: a file's name without its ending, or a factory's."""
    return text.rpartition(":")[2] if names_function(text) else Path(text).stem


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


def named_files(values: Mapping[str, Any]) -> list[str]:
    """Of an allocator's options, those that name files that are there, such as a table of latencies."""
    given = [
        value
        for given_value in values.values()
        for value in (given_value if isinstance(given_value, list | tuple) else (given_value,))
    ]
    return [value for value in given if isinstance(value, str) and exists(Path(value))]
