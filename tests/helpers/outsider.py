"""An allocator as somebody else's distribution would bring it: public names alone."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from mpq_plugins import LayerTable, Needs, Plan, make_plan


@dataclass(frozen=True)
class FirstLast:
    """One width at both ends, another inside."""

    name: ClassVar[str] = "firstlast"

    edge: Annotated[int, "bits at both ends"]
    inner_bits: int = 4
    generous: bool = False

    @property
    def needs(self) -> Needs:
        return Needs((self.edge, self.inner_bits))

    def __call__(self, table: LayerTable) -> Plan:
        names = [layer.name for layer in table.layers]
        edge = self.edge + self.generous
        return make_plan(table, self, {n: edge if n in (names[0], names[-1]) else self.inner_bits for n in names})
