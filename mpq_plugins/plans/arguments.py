"""Whether arguments are what they are called: a plan, a table. models/arguments.py says it of modules."""

from pathlib import Path

from ..errors import SettingError
from .plan import Plan
from .table import LayerTable
from .type_table import TypeTable


def check_plan(plan: object, name: str = "plan") -> None:
    """Raise SettingError where an argument of this name is no Plan."""
    if isinstance(plan, Plan):
        return
    remedy = "an allocator makes one of a table, as Budget(average_bits=4)(table), and Plan.load reads one"
    if isinstance(plan, str | Path):
        remedy = "Plan.load it first"
    elif hasattr(plan, "named_modules"):
        remedy = "the model comes before the plan"
    raise SettingError(f"{name}: is a {type(plan).__name__}, no Plan; {remedy}")


def check_table(table: object, name: str = "table") -> None:
    """Raise SettingError where an argument of this name is no LayerTable; a TypeTable is another."""
    if not isinstance(table, LayerTable):
        _refuse_table(table, name, "LayerTable")


def check_any_table(table: object) -> None:
    """Raise SettingError where a table is neither a LayerTable nor a TypeTable."""
    if not isinstance(table, LayerTable | TypeTable):
        _refuse_table(table, "table", "LayerTable or TypeTable")


def _refuse_table(table: object, name: str, wanted: str) -> None:
    if isinstance(table, str | Path):
        remedy = "LayerTable.load it first"
    elif isinstance(table, TypeTable):
        remedy = "measure makes one of widths; columns of types have none"
    else:
        remedy = "measure(model) makes one, and LayerTable.load reads one"
    raise SettingError(f"{name}: is a {type(table).__name__}, no {wanted}; {remedy}")
