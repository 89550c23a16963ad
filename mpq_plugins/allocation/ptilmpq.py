"""PTILMPQ (arXiv 2404.02947): important layers, and important channels inside every layer, get the higher bits."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, PlainValidator, ValidationInfo, model_validator
from pydantic_core import ArgsKwargs

from ..common.checks import number, shown
from ..common.public import public
from ..common.settings import said, settings
from ..errors import SettingError
from ..plans.arguments import check_table
from ..plans.granular import check_bits
from ..plans.piecewise import Piecewise
from ..plans.plan import Plan
from ..plans.size import layer_size
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from .choices import layer_choice
from .contract import Needs
from .fields import ranged
from .make import make_plan

DEFAULT_ALPHA = 0.5
DEFAULT_BETA = 0.5
WHAT_COUNTS = ("alpha", "layer_threshold", "average_bits", "size_bytes")  # each says how many layers are important

Widths = NDArray[np.int64]


def _fraction(name: str, value: Any) -> float:
    return number(name, value, "a share from 0 to 1", least=0, most=1)


def _pair(value: Any, info: ValidationInfo) -> tuple[int, int]:
    name = str(info.field_name)
    if not isinstance(value, Sequence) or len(value) != 2:
        raise SettingError(f"{name}: {shown(value)} is not allowed; two widths, high,low, as in 4,3")
    high, low = (check_bits(bits, name) for bits in value)
    if high < low:
        raise SettingError(f"{name}: high {high} is below low {low}; write {low},{high}")
    return high, low


def _as_given(value: Any, info: ValidationInfo) -> Any:
    """Python's own numbers as they are, for their files; any other as a float."""
    checked = number(str(info.field_name), value, "a number from 0 up", least=0)
    return value if type(value) in (int, float) else checked


Share = Annotated[float, ranged("a share from 0 to 1", least=0, most=1)]
Pair = Annotated[tuple[int, int], BeforeValidator(_pair)]
Amount = Annotated[float, PlainValidator(_as_given)]
Bytes = Annotated[int, PlainValidator(_as_given)]


@public
@settings
class PTILMPQ:
    """Bits by two partitions: layers by F_l = sum |w|, and the output channels of each by F_c = ||w_c||_2.

    PTILMPQ (arXiv 2404.02947). The ceil(alpha L) layers of greatest F_l are important, and in each layer the ceil(beta
    C) channels of greatest F_c. A layer's important channels get the first of its pair of bits, the rest the second.
    Equal importances go by the table's order. The plan has the table's scheme; the paper's is `Piecewise`, which `mpq
    plan` measures under when no scheme is asked for. It records what was found.

    Attributes:
        alpha: Share of layers that are important, 0 to 1.
        beta_important: Share of channels that are important in important layers, 0 to 1.
        beta_other: The same in the other layers.
        important_bits: (high, low) of important layers, 1 to 8.
        other_bits: (high, low) of the other layers.
        layer_threshold: Instead of alpha, the least F_l of an important layer, in the weights' units.
        channel_threshold: Instead of the betas, the least F_c of an important channel, in the weights' units.
        average_bits: Instead of alpha, most bits a weight (codes, interval bits included). The greatest alpha that
            stays within it is found.
        size_bytes: Instead of alpha, most bytes in total. The greatest alpha that stays within it is found.

    Raises:
        SettingError: A fraction outside [0, 1]; high < low; important bits or beta below the others', which would make
            a plan smaller as alpha rises; two ways of saying the same. When called: a table without channel norms, a
            width that its scheme does not have, or a size that no alpha reaches.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> table = mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)))
        >>> sorted(layer.bits_text for layer in mpq.PTILMPQ(alpha=0.5)(table).layers)
        ['3x4 4x4', '4x4 5x4']
    """

    name: ClassVar[str] = "ptilmpq"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": tuple(k / 10 for k in range(11))}

    alpha: Annotated[Share | None, f"share of layers that are important ({DEFAULT_ALPHA})"] = None
    beta_important: Annotated[Share | None, f"share of their channels that are ({DEFAULT_BETA})"] = None
    beta_other: Annotated[Share | None, "share of the other layers' channels that are (as beta_important)"] = None
    important_bits: Annotated[Pair, "high,low of important layers"] = (5, 4)
    other_bits: Annotated[Pair, "high,low of the other layers"] = (4, 3)
    layer_threshold: Annotated[Amount | None, "instead of alpha: least sum |w| of an important layer"] = None
    channel_threshold: Annotated[Amount | None, "instead of betas: least 2-norm of an important channel"] = None
    average_bits: Annotated[Amount | None, "instead of alpha: most bits a weight, scales not counted"] = None
    size_bytes: Annotated[Bytes | None, "instead of alpha: most bytes in total"] = None

    @model_validator(mode="before")
    @classmethod
    def _settled(cls, given: ArgsKwargs) -> dict[str, Any]:
        """What is not said follows what is, so that one option sweeps both."""
        named = said(cls, given).items()
        values = {name: value for name, value in named if value is not None or name in ("important_bits", "other_bits")}
        counts = [name for name in WHAT_COUNTS if name in values]
        if len(counts) > 1:
            raise SettingError(f"{counts[0]} and {counts[1]} say the same thing twice; give one")
        if not counts:
            values["alpha"] = DEFAULT_ALPHA
        if "channel_threshold" in values:
            if "beta_important" in values or "beta_other" in values:
                raise SettingError("channel_threshold and the betas say the same thing twice; give one")
            return values
        if "beta_important" not in values:
            values["beta_important"] = max(DEFAULT_BETA, _fraction("beta_other", values.get("beta_other", 0.0)))
        return {"beta_other": values["beta_important"], **values}

    def __post_init__(self) -> None:
        important, other = self.beta_important, self.beta_other
        if important is not None and other is not None and important < other:
            raise SettingError(
                f"beta_important: {important:g} is below beta_other {other:g}; important layers "
                "keep at least the share of important channels that others do"
            )
        if any(more < fewer for more, fewer in zip(self.important_bits, self.other_bits, strict=True)):
            raise SettingError(
                f"important_bits: {_shown(self.important_bits)} is below other_bits {_shown(self.other_bits)}; "
                "important layers get at least as many bits"
            )

    @property
    def needs(self) -> Needs:
        """What to measure: importances, which every table has; errors at its widths, to be shown beside the plan."""
        return Needs(
            tuple(sorted({*self.important_bits, *self.other_bits})), scheme=Piecewise(granularity="per_channel")
        )

    def __call__(self, table: LayerTable) -> Plan:
        """Make the plan for a measured table.

        Args:
            table: The measured layers.

        Returns:
            The plan.

        Raises:
            SettingError: The table has no channel norms or not the widths, or no alpha reaches the size.
        """
        check_table(table)
        for field in ("important_bits", "other_bits"):
            for bits in getattr(self, field):
                table.scheme.check_bits(bits, field)
        for layer in table.layers:
            _check_norms(layer)
        order = np.argsort([-layer.importance for layer in table.layers], kind="stable")
        important = [self._widths(layer, True) for layer in table.layers]
        other = [self._widths(layer, False) for layer in table.layers]
        count = self._important_count(table, order, important, other)
        chosen = set(order[:count].tolist())
        bits = {layer.name: important[i] if i in chosen else other[i] for i, layer in enumerate(table.layers)}
        facts = {"alpha": count / max(1, len(table.layers))} if self._sized else {}
        return make_plan(table, self, bits, found=facts)

    @property
    def _sized(self) -> bool:
        return self.average_bits is not None or self.size_bytes is not None

    def _widths(self, layer: LayerStats, important: bool) -> Widths:
        """Bits of each output channel."""
        high, low = self.important_bits if important else self.other_bits
        if self.channel_threshold is not None:
            above = layer.channel_importance >= self.channel_threshold
        else:
            beta = self.beta_important if important else self.beta_other
            assert beta is not None
            above = np.zeros(layer.channels, np.bool_)
            above[np.argsort(-layer.channel_importance, kind="stable")[: _share(beta, layer.channels)]] = True
        return np.where(above, high, low)

    def _important_count(
        self, table: LayerTable, order: NDArray[np.intp], important: Sequence[Widths], other: Sequence[Widths]
    ) -> int:
        """How many layers, from the most important down, are important."""
        if self.layer_threshold is not None:
            return sum(layer.importance >= self.layer_threshold for layer in table.layers)
        if not self._sized:
            assert self.alpha is not None
            return _share(self.alpha, len(table.layers))
        sizes = [
            np.array([self._bits(layer, widths, table) for layer, widths in zip(table.layers, choice, strict=True)])
            for choice in (important, other)
        ]
        by_count = sizes[1].sum() + np.concatenate([[0], np.cumsum((sizes[0] - sizes[1])[order])])
        return self._largest_within(by_count, sum(layer.numel for layer in table.layers))

    def _bits(self, layer: LayerStats, widths: Widths, table: LayerTable) -> int:
        """What the layer costs, in the accounting of the target."""
        size = layer_size(layer_choice(layer, widths, table.scheme))
        return size.total if self.average_bits is None else size.codes + size.intervals

    def _largest_within(self, by_count: NDArray[np.int64], numel: int) -> int:
        if self.size_bytes is not None:
            within = np.flatnonzero(by_count <= 8 * self.size_bytes)
        else:  # as the plan's own size says it, to the last bit
            within = np.flatnonzero(by_count / max(1, numel) <= (self.average_bits or 0.0))
        if within.size:
            return int(within[-1])
        least = int(by_count.min())
        if self.size_bytes is not None:
            asked, reached = f"size_bytes: {self.size_bytes}", f"{math.ceil(least / 8)} bytes"
        else:
            asked, reached = f"average_bits: {self.average_bits:g}", f"{least / max(1, numel):.3f}"
        raise SettingError(
            f"{asked} cannot be reached: at these widths the smallest plan has {reached}. Lower other_bits or "
            "beta_other."
        )


def _share(fraction: float, count: int) -> int:
    """ceil(fraction x count), 0.07 of 100 being 7 and not, by the last bit of a double, 8."""
    return math.ceil(round(fraction * count, 9))


def _shown(pair: tuple[int, int]) -> str:
    return f"{pair[0]},{pair[1]}"


def _check_norms(layer: LayerStats) -> None:
    norms = layer.channel_importance
    if norms.shape != (layer.channels,) or not np.isfinite(norms).all():
        raise SettingError(
            f"layer {layer.name!r}: the table has no norm for each of its {layer.channels} channels; measure again"
        )
