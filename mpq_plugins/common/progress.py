"""How long work says how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, as a layer's name, how much of it is done, and how much there is at most."""
