"""SQNR: bits in closed form from the number of weights alone (Lin, Talathi, Annapureddy 2015, arXiv 1511.06393).

Every layer's signal-to-noise ratio lambda_l grows by kappa = 20 log10 2 dB a bit, and noises add:
1 / lambda = sum_l 1 / lambda_l. The least sum of n_l b_l at a given lambda then has n_l lambda_l the same for every
layer, so

    b_l = b_0 - (10 / kappa) log10 n_l = b_0 - log2(n_l) / 2      (their sec. 3.2)

a layer with four times the weights gets one bit less. A cheap reference: it looks at no weight.
"""

import math
from typing import Annotated, ClassVar

import numpy as np

from ..common.public import public
from ..common.settings import settings
from ..errors import SettingError
from ..plans.arguments import check_table
from ..plans.plan import Plan
from ..plans.table import LayerTable
from .contract import Needs
from .fields import AverageBits, Candidates
from .limits import code_limit
from .make import make_plan


@public
@settings
class SQNR:
    """b_l = b_0 - log2(n_l) / 2, rounded and kept within `bits`, b_0 the greatest that keeps the average.

    Attributes:
        average_bits: Most bits a weight, codes alone, interval bits included.
        bits: The candidate widths, 1 to 8.

    Raises:
        SettingError: The average is not above 0, or widths lie outside 1..8. When called: the average is below the
            least width.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> table = mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 64)))
        >>> [layer.bits for layer in mpq.SQNR(average_bits=4)(table).layers]
        [5, 3]
    """

    name: ClassVar[str] = "sqnr"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"average_bits": (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)}

    average_bits: Annotated[AverageBits, "most bits a weight, scales not counted"] = 4.0
    bits: Candidates = tuple(range(2, 9))

    @property
    def needs(self) -> Needs:
        """What to measure: the shapes, which every table has, and errors at its widths, to be shown beside the plan."""
        return Needs(self.bits)

    def __call__(self, table: LayerTable) -> Plan:
        """Make the plan for a measured table.

        Args:
            table: The measured layers.

        Returns:
            The plan.

        Raises:
            SettingError: The average is below the least width.
        """
        check_table(table)
        for b in self.bits:
            table.scheme.check_bits(b, "bits")
        sizes = np.array([max(1, layer.numel) for layer in table.layers], np.float64)
        widths = np.array(self.bits)
        middles = (widths[1:] + widths[:-1]) / 2
        # b_0 at which some layer moves to the next width; the plan changes nowhere else.
        steps = np.unique([-math.inf, *(middles[None] + np.log2(sizes)[:, None] / 2).ravel()])
        limit = code_limit("average_bits", self.average_bits, self.average_bits, "bits", table.scheme)
        costs = np.array([limit.whole(layer, self.bits) for layer in table.layers])
        choices = [np.searchsorted(middles, b0 - np.log2(sizes) / 2 + 1e-9) for b0 in steps]
        totals = np.array([costs[np.arange(len(sizes)), choice].sum() for choice in choices])
        within = np.flatnonzero(totals / max(1, sum(layer.numel for layer in table.layers)) <= self.average_bits)
        if not within.size:
            raise SettingError(
                f"average_bits: {self.average_bits:g} cannot be reached: the least of these widths gives "
                f"{totals[0] / sizes.sum():.3f}. Lower bits."
            )
        chosen = widths[choices[int(within[-1])]].tolist()
        names = [layer.name for layer in table.layers]
        return make_plan(table, self, dict(zip(names, chosen, strict=True)))
