"""A configured method: a frozen dataclass whose fields pydantic checks, and whose refusals are SettingError."""

from collections.abc import Callable
from dataclasses import field, fields
from functools import wraps
from inspect import signature
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, ErrorDetails

from ..errors import SettingError
from .checks import shown

Class = TypeVar("Class", bound=type)
# Defaults go through the same checks, so that a field holds one form of a value: 2 and 2.0 make the same plan.
CONFIG = ConfigDict(extra="forbid", strict=True, validate_default=True, arbitrary_types_allowed=True)
OF_THE_CALL = ("unexpected_keyword_argument", "unexpected_positional_argument", "multiple_argument_values")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings(cls: Class) -> Class:
    """Make a class a frozen dataclass of checked fields, as `@settings class MixQuant: qem: float = 2.0`.

    A field's check is a pydantic validator in its annotation, which returns the value to hold or raises SettingError;
    checks over several fields go into `__post_init__`. Whatever is refused is SettingError, and a call that has no such
    argument is TypeError, as of any dataclass.
    """
    made: Any = dataclass(frozen=True, config=CONFIG)(cls)
    made.__init__ = _refusing(made.__init__, cls.__name__)
    made.__init__.__annotations__ = {each.name: each.type for each in fields(made) if each.init} | {"return": None}
    checked: Class = made
    return checked


def said(cls: type, given: ArgsKwargs) -> dict[str, Any]:
    """A call's arguments by the names of the fields: what was said, without the defaults. Raises TypeError."""
    return signature(cls).bind(*given.args, **(given.kwargs or {})).arguments


def _refusing(init: Callable[..., None], name: str) -> Callable[..., None]:
    @wraps(init)
    def checked(self: Any, *values: Any, **named: Any) -> None:
        try:
            init(self, *values, **named)
        except ValidationError as error:
            raise _refusal(error.errors(include_url=False)[0], name) from None

    return checked


def _refusal(problem: ErrorDetails, name: str) -> Exception:
    """What a validator raised, or pydantic's own finding as ours."""
    raised = problem.get("ctx", {}).get("error")
    if isinstance(raised, SettingError):
        return raised
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in OF_THE_CALL or problem["type"] == "missing":
        return TypeError(f"{name}() {place}: {problem['msg'][:1].lower()}{problem['msg'][1:]}")
    allowed = problem["msg"]
    if problem["type"] == "literal_error":
        allowed = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
    if problem["type"] == "bool_type":
        allowed = "True or False"
    return SettingError(f"{place}: {shown(problem['input'])} is not allowed; {allowed}")
