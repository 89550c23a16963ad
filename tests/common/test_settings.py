"""Settings: dataclasses whose fields are checked, and whose refusals are SettingError."""

import dataclasses
import pickle
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import BeforeValidator, ValidationInfo, model_validator
from pydantic_core import ArgsKwargs

from mpq_plugins.common.checks import number
from mpq_plugins.common.settings import said, settings
from mpq_plugins.errors import SettingError


def _share(value: Any, info: ValidationInfo) -> float:
    return number(str(info.field_name), value, "a share from 0 to 1", least=0, most=1)


Share = Annotated[float, BeforeValidator(_share)]


@settings
class Method:
    """A method with settings."""

    name: ClassVar[str] = "method"

    share: Annotated[Share | None, "text of an option"] = 1
    mode: Literal["fast", "exact"] = "fast"
    others: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.mode == "exact" and self.share is None:
            raise SettingError("share: exact needs one")


@settings
class Following:
    """What is not said follows what is."""

    first: Share = 0.5
    second: Share = 0.5

    @model_validator(mode="before")
    @classmethod
    def _settled(cls, given: ArgsKwargs) -> dict[str, Any]:
        values = said(cls, given)
        return {"second": values.get("first", 0.25), **values}


UNTYPED: Any = Method


def test_it_is_a_frozen_dataclass() -> None:
    made = Method(0.5, mode="exact")
    assert dataclasses.is_dataclass(UNTYPED)
    assert [field.name for field in dataclasses.fields(Method)] == ["share", "mode", "others"]
    assert repr(made) == "Method(share=0.5, mode='exact', others=(1, 2))"
    assert made == Method(0.5, "exact")
    assert hash(made) == hash(Method(0.5, "exact"))
    assert made != Method(0.5)
    assert pickle.loads(pickle.dumps(made)) == made  # noqa: S301  # our own
    assert dataclasses.replace(made, mode="fast") == Method(0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.share = 1.0  # type: ignore[misc]


def test_defaults_are_checked_as_what_is_given() -> None:
    assert type(Method().share) is float
    assert Method().share == Method(share=1).share == Method(share=1.0).share


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"share": 2}, "share: 2 is not allowed; a share from 0 to 1"),
        ({"share": True}, "share: True is not allowed; a share from 0 to 1"),
        ({"share": "x"}, "share: 'x' is not allowed; a share from 0 to 1"),
        ({"mode": "quick"}, "mode: 'quick' is not allowed; fast, exact"),
        ({"others": "12"}, "others: '12' is not allowed; "),
        ({"share": None, "mode": "exact"}, "share: exact needs one"),
    ],
)
def test_what_is_refused_is_a_setting_error(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError) as error:
        Method(**given)
    assert str(error.value).startswith(said)
    assert error.value.__cause__ is None


@pytest.mark.parametrize(
    "call", [lambda: UNTYPED(speed=3), lambda: UNTYPED(0.5, "fast", (1,), 4), lambda: UNTYPED(0.5, share=0.5)]
)
def test_a_call_without_such_arguments_is_a_type_error(call: Any) -> None:
    with pytest.raises(TypeError):
        call()
    with pytest.raises(TypeError):
        Following(0.5, 0.5, 0.5)  # type: ignore[call-arg]


def test_what_is_not_said_may_follow_what_is() -> None:
    assert Following() == Following(0.5, 0.25)
    assert Following(0.75) == Following(first=0.75, second=0.75)
    assert Following(0.75, 0.1) == Following(second=0.1, first=0.75)
