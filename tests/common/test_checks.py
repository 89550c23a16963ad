"""Numbers as settings have them."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from mpq_plugins.common.checks import LARGEST_INTEGER, integer, number
from mpq_plugins.errors import SettingError


@pytest.mark.parametrize("value", [0, 3, 2.5, np.float32(1.5), np.int64(2), Fraction(1, 2), 1e308])
def test_a_number_is_given_back_as_a_float(value: Any) -> None:
    checked = number("lr", value, "a number from 0 up", least=0)
    assert type(checked) is float
    assert checked == value


@pytest.mark.parametrize("value", [-1, -0.5, math.nan, math.inf, True, False, None, "3", 10**400, 1j, [1]])
def test_what_is_no_number_in_the_range_is_named(value: Any) -> None:
    with pytest.raises(SettingError, match=r"^lr: .{1,60} is not allowed; a number from 0 up$"):
        number("lr", value, "a number from 0 up", least=0)


def test_a_bound_may_be_beyond_what_is_allowed() -> None:
    assert number("qem", 1e-300, "above 0", above=0) == 1e-300
    assert number("mix", 1, "a share", least=0, most=1) == 1
    for value in (0, -0.0):
        with pytest.raises(SettingError, match="qem"):
            number("qem", value, "above 0", above=0)
    with pytest.raises(SettingError, match="mix"):
        number("mix", 1.0000001, "a share", least=0, most=1)


@pytest.mark.parametrize("value", [1, 7, LARGEST_INTEGER])
def test_an_integer_is_given_back(value: int) -> None:
    assert integer("steps", value, "from 1 up", least=1) == value


@pytest.mark.parametrize("value", [0, -1, LARGEST_INTEGER + 1, 1.0, True, np.int64(1), "1", None])
def test_what_is_no_integer_in_the_range_is_named(value: Any) -> None:
    with pytest.raises(SettingError, match=r"steps: .* is not allowed; from 1 up"):
        integer("steps", value, "from 1 up", least=1)
