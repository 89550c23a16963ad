"""Loops compiled without fast-math, so that the same input gives the same output on every processor."""

from collections.abc import Callable
from typing import Any

exactly: Callable[[Callable[..., Any]], Callable[..., Any]]
"""numba's compiler; where numba is missing or cannot be used the loop runs as it is written, very slowly."""

try:
    import numba

    exactly = numba.njit(nogil=True, cache=True, error_model="numpy")
except (ImportError, RuntimeError, OSError):

    def exactly(function: Callable[..., Any]) -> Callable[..., Any]:
        """As it is."""
        return function
