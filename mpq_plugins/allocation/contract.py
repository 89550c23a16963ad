"""What an allocator is, and what it needs of a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from ..common.public import public
from ..plans.plan import Plan
from ..plans.scheme import Scheme
from ..plans.table import LayerTable

Widths = int | Sequence[int] | NDArray[np.int64]


@public
@dataclass(frozen=True)
class Needs:
    """What a table must hold for an allocator: these errors at these bit-widths.

    Attributes:
        bits: The widths, 1 to 8.
        metrics: The errors, by name.
        channel_errors: Whether they are needed for each output channel.
        scheme: What to measure under where the user asks for nothing else.
    """

    bits: tuple[int, ...]
    metrics: tuple[str, ...] = ()
    channel_errors: bool = False
    scheme: Scheme | None = None


@public
class Allocator(Protocol):
    """A frozen dataclass: its fields are its parameters, and its options on the command line.

    `Annotated[type, "text"]` on a field gives its help. A class attribute `grid`, field -> values, is what `mpq sweep`
    tries where the user names none. An allocator that needs one of several fields names them in a class attribute
    `one_of`, and in `usual`, field -> value, what `mpq plan` takes where the user gives none of them. In `beside`,
    field -> fields, it may name those that the help lists only where the first is given.

    Attributes:
        name: How plans and the command line call it.
    """

    name: ClassVar[str]

    @property
    def needs(self) -> Needs:
        """What to measure before calling it."""
        ...

    def __call__(self, table: LayerTable) -> Plan:
        """Make the plan; the same table and value give the same bytes.

        Args:
            table: The measured layers.

        Returns:
            The plan.
        """
        ...
