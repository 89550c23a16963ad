"""MixQuant (arXiv 2309.17341, Alg. 1): per layer the fewest bits whose error stays within QEM of the baseline's."""

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import SkipValidation

from ..common.public import public
from ..common.settings import settings
from ..errors import SettingError
from ..plans.arguments import check_table
from ..plans.plan import Plan
from ..plans.scheme import Scheme
from ..plans.table import LayerTable
from .contract import Needs
from .fields import Candidates, Width, ranged
from .make import make_plan

Metric = Literal["relative", "mse", "rmse", "max_abs"]  # sqnr_db grows as the error falls: no bound QEM x QE fits it


@public
@settings
class MixQuant:
    """min b in `bits` with QE(b) <= qem * QE(baseline), layer by layer; `baseline` where none qualifies.

    MixQuant (arXiv 2309.17341, Alg. 1). QE is `metric`, dimensionless (`relative`) or in the weights' units (squared
    for `mse`). `relative` is the default: each bit removed multiplies the MSE by about 4, so at the paper's own QEMs
    (1.1 to 3.5) MSE selects nothing below 8 bits, while the paper's tables show 4- to 7-bit layers; the mean relative
    error (its sec. 6) gives that pattern. It saturates at 1, so a large QEM suddenly sends a layer to 2 bits.

    Attributes:
        qem: The quantization error multiplier: the most error, in the baseline's.
        metric: Which error is bounded.
        bits: The candidate widths, 1 to 8.
        baseline: The width whose error is the yardstick, 1 to 8.
        scheme: The base quantizer. None takes the table's, and another than the table's is refused.

    Raises:
        SettingError: qem is not above 0, bits or baseline lie outside 1..8, or the metric is unknown. When called: the
            table lacks an error it needs.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> table = mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8)))
        >>> mpq.MixQuant(qem=1000)(table).layers[0].bits
        2
    """

    name: ClassVar[str] = "mixquant"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"qem": (1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0)}

    qem: Annotated[
        float,
        "quantization error multiplier: most error, in the baseline's",
        ranged("a number above 0 (the paper uses 1.1 to 3.5)", above=0),
    ] = 2.0
    metric: Annotated[Metric, "which error to bound"] = "relative"
    bits: Candidates = tuple(range(2, 9))
    baseline: Annotated[Width, "bit-width whose error is the yardstick"] = 8
    scheme: SkipValidation[Scheme | None] = None

    @property
    def needs(self) -> Needs:
        """What to measure: errors at the candidates and the baseline."""
        return Needs(tuple(sorted({*self.bits, self.baseline})), (self.metric,))

    def __call__(self, table: LayerTable) -> Plan:
        """Make the plan for a measured table.

        Args:
            table: The measured layers.

        Returns:
            The plan.

        Raises:
            SettingError: The table lacks an error that is needed, or has another scheme.
        """
        check_table(table)
        if self.scheme not in (None, table.scheme):
            raise SettingError(f"scheme: {self.scheme} is not what the table was measured with ({table.scheme})")
        errors = table.errors(self.metric, (*self.bits, self.baseline))
        within = errors[:, :-1] <= self.qem * errors[:, -1:]
        fewest = np.where(within.any(axis=1), np.array(self.bits)[within.argmax(axis=1)], self.baseline)
        names = [layer.name for layer in table.layers]
        return make_plan(table, self, dict(zip(names, fewest.tolist(), strict=True)))
