"""The guard: is a plan predicted to be better than uniform widths of its own true size, and how far is the best one?"""

import math
import warnings
from dataclasses import dataclass

from .errors import PlanWarning
from .objective import check, layer_curve, predicted
from .plan import Plan
from .scheme import Affine
from .size import layer_size
from .table import LayerTable

# What is compared on where nothing is asked: the change of the network's own output if the table has one, for it alone
# makes layers comparable; else the error of the weights.
FIRST_CHOICE = ("kl", "distance", "mse", "relative")
SPLITS = ("mse", "output_mse", "relative")
WORSE = 1.001  # as a ratio; predictions are no finer than that


@dataclass(frozen=True)
class Comparison:
    """Predicted costs at one size in total: the plan's, that of uniform widths, and that of the best width per layer.

    uniform is interpolated (its logarithm, between whole widths) and None below the smallest uniform plan; best is None
    where no plan with one width per layer is that small. average_bits: a weight, in total.
    """

    sensitivity: str
    average_bits: float
    plan: float
    uniform: float | None
    best: float | None

    @property
    def worse(self) -> bool:
        """Whether uniform widths of that size are predicted to be better, and some plan of one width a layer is too.

        Between two whole widths uniform is an interpolation, which no plan need reach.
        """
        beaten = self.uniform is not None and self.plan > WORSE * self.uniform
        return beaten and self.best is not None and self.plan > WORSE * self.best

    def text(self) -> str:
        """One line with the numbers."""
        said = [f"predicted {self.sensitivity} at {self.average_bits:.3f} bits in total: {self.plan:.4g}"]
        if self.uniform is not None:
            said.append(f"uniform widths of that size {self.uniform:.4g}")
        if self.best is not None:
            said.append(f"the best width for each layer {self.best:.4g}")
        return ", ".join(said)


def compare(table: LayerTable, plan: Plan, sensitivity: str | None = None) -> Comparison | None:
    """Set a plan against uniform widths, and against Budget per layer, at its own size in total.

    sensitivity: an error or sensitivity of the table, or two as in kl*mse; by default the first there is of kl,
    distance, mse and relative, split by channel where the plan has parts. None where the table cannot tell (other
    widths, another scheme, parts without numbers per channel). Raises SettingError for what was not measured.
    """
    if sensitivity is not None:
        check(table, sensitivity)
    name = sensitivity or _chosen(table, plan)
    cost = None if name is None else predicted(table, plan, name)
    if name is None or cost is None:
        return None
    if not math.isfinite(cost):
        return None
    size = plan.size()
    uniform = _uniform_cost(table, name, size.total_bits)
    best = _best_cost(table, name, size.total_bits)
    return Comparison(name, size.total_average_bits, cost, uniform, best)


def warn_if_worse(table: LayerTable, plan: Plan) -> None:
    """Warn with PlanWarning of a plan that is predicted to be worse than uniform widths of its size."""
    found = compare(table, plan)
    if found is not None and found.worse:
        warnings.warn(worse_text(plan, found), PlanWarning, stacklevel=4)


def worse_text(plan: Plan, found: Comparison) -> str:
    """What is wrong with the plan, and what to do."""
    return (
        f"this {plan.allocator.name} plan is predicted to be worse than uniform widths: {found.text()}. Other "
        f"parameters may do better, and "
        f"Budget(total_average_bits={found.average_bits:.3f}, sensitivity={found.sensitivity!r}) does"
    )


def _chosen(table: LayerTable, plan: Plan) -> str | None:
    has = (*table.sensitivities, *table.metrics)
    first = next((name for name in FIRST_CHOICE if name in has), None)
    if first is None or all(layer.parts is None for layer in plan.layers) or _by_channel(table, first):
        return first
    split = next((name for name in SPLITS if name in has and _by_channel(table, name)), None)
    return None if split is None else f"{first}*{split}"


def _by_channel(table: LayerTable, name: str) -> bool:
    return name in table.channel_sensitivities or any(name in layer.channel_errors for layer in table.layers[:1])


def _uniform_cost(table: LayerTable, name: str, bits: int) -> float | None:
    points = sorted(_uniform_points(table, name))
    below = [point for point in points if point[0] <= bits]
    above = [point for point in points if point[0] > bits]
    if not below:
        return None
    (size, cost) = below[-1]
    if not above or cost <= 0 or above[0][1] <= 0:
        return cost
    (larger, lower) = above[0]
    share = (bits - size) / (larger - size)
    return math.exp((1 - share) * math.log(cost) + share * math.log(lower))


def _uniform_points(table: LayerTable, name: str) -> list[tuple[int, float]]:
    """Size in total and predicted cost of the uniform plan of every width that was measured."""
    from .allocate.base import layer_choice

    widths = _widths(table)
    curves = [layer_curve(table, layer, name, widths) for layer in table.layers]
    sizes = [[layer_size(layer_choice(layer, b, table.scheme)).total for b in widths] for layer in table.layers]
    return [(sum(own[k] for own in sizes), math.fsum(float(curve[k]) for curve in curves)) for k in range(len(widths))]


def _widths(table: LayerTable) -> list[int]:
    """Those of the table that its scheme has codes of."""
    return [b for b in table.bits if b > 1 or isinstance(table.scheme, Affine)]


def _best_cost(table: LayerTable, name: str, bits: int) -> float | None:
    from .allocate.budget import best_cost

    return best_cost(table, name, _widths(table), bits)
