"""How long work says how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a layer's name, the weights measured so far and the weights in all."""
