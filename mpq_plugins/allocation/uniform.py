"""The same bits everywhere: what every other plan has to beat at equal size."""

from typing import Annotated, ClassVar

from ..common.public import public
from ..common.settings import settings
from ..plans.plan import Plan
from ..plans.table import LayerTable
from .contract import Needs
from .fields import Width
from .make import make_plan


@public
@settings
class Uniform:
    """`bits` for every layer. Raises SettingError outside 1..8."""

    name: ClassVar[str] = "uniform"
    grid: ClassVar[dict[str, tuple[int, ...]]] = {"bits": tuple(range(2, 9))}

    bits: Annotated[Width, "bit-width of every layer"] = 8

    @property
    def needs(self) -> Needs:
        """The error at its own bit-width, to be shown beside the plan."""
        return Needs((self.bits,))

    def __call__(self, table: LayerTable) -> Plan:
        """The plan for a table."""
        return make_plan(table, self, {layer.name: self.bits for layer in table.layers})
