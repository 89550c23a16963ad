"""The same bits everywhere: what every other plan has to beat at equal size."""

from typing import Annotated, ClassVar

from ..common.public import public
from ..common.settings import settings
from ..plans.arguments import check_table
from ..plans.plan import Plan
from ..plans.table import LayerTable
from .contract import Needs
from .fields import Width
from .make import make_plan


@public
@settings
class Uniform:
    """The same width for every layer.

    Attributes:
        bits: The width, 1 to 8.

    Raises:
        SettingError: The width is not one of these.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8))))
        >>> plan.size().weights_only_bytes
        32
    """

    name: ClassVar[str] = "uniform"
    grid: ClassVar[dict[str, tuple[int, ...]]] = {"bits": tuple(range(2, 9))}

    bits: Annotated[Width, "bit-width of every layer"] = 8

    @property
    def needs(self) -> Needs:
        """What to measure: the error at its own bit-width, to be shown beside the plan."""
        return Needs((self.bits,))

    def __call__(self, table: LayerTable) -> Plan:
        """Make the plan for a measured table.

        Args:
            table: The measured layers.

        Returns:
            The plan.

        Raises:
            SettingError: The table's scheme does not have the width.
        """
        check_table(table)
        return make_plan(table, self, {layer.name: self.bits for layer in table.layers})
