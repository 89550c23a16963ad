"""An allocator in a package of its own: the fewest bits at which a layer's error stays within a bound."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from mpq_plugins import LayerTable, Needs, Plan, SettingError, make_plan


@dataclass(frozen=True)
class Within:
    """min b in `bits` with mean |w - w'| / |w| <= most, layer by layer; the widest where none qualifies."""

    name: ClassVar[str] = "within"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"most": (0.05, 0.1, 0.2, 0.4)}

    most: Annotated[float, "largest mean relative error of a layer's weights"] = 0.1
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)

    def __post_init__(self) -> None:
        if not self.most > 0:
            raise SettingError(f"most: {self.most!r} is not allowed; a number above 0, such as 0.1")

    @property
    def needs(self) -> Needs:
        """The relative errors at the candidates."""
        return Needs(self.bits, ("relative",))

    def __call__(self, table: LayerTable) -> Plan:
        """The plan for a table."""
        widths = sorted(self.bits)
        errors = table.errors("relative", widths)  # (layers, widths)
        chosen = {
            layer.name: next((b for b, error in zip(widths, row, strict=True) if error <= self.most), widths[-1])
            for layer, row in zip(table.layers, errors, strict=True)
        }
        return make_plan(table, self, chosen)
