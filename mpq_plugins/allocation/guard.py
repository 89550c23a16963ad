"""The guard: is a plan predicted to be better than uniform widths of its own true size, and how far is the best one?"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..common.public import public
from ..errors import PlanWarning
from ..plans.arguments import check_plan, check_table
from ..plans.plan import Plan
from ..plans.scheme import has_width
from ..plans.size import layer_size
from ..plans.table import LayerTable
from .objective import check, layer_curve, predicted

# What is compared on where nothing is asked: the change of the network's own output if the table has one, for it alone
# makes layers comparable; else the error of the weights.
FIRST_CHOICE = ("kl", "distance", "mse", "relative")
SPLITS = ("mse", "output_mse", "relative")
JUDGED = ("relative", "mse")  # errors that are always measured: cheap beside the reading, and they judge any plan
FEW_LAYERS = 300  # of which the best widths are found exactly at once; of more, to about one layer's step
WORSE = 1.001  # as a ratio; predictions are no finer than that


@public
@dataclass(frozen=True)
class Comparison:
    """Predicted costs at one size in total: the plan's, that of uniform widths, and that of the best width per layer.

    Attributes:
        sensitivity: The judge, by which costs are predicted.
        total_bits: The plan's size, with scales and all.
        average_bits: The same for one of its weights.
        plan: The plan's cost.
        uniform: That of uniform widths. It is interpolated (its logarithm, between whole widths), and None below the
            smallest uniform plan.
        best: That of the best plan with one width per layer; None where none is that small.
    """

    sensitivity: str
    total_bits: int
    average_bits: float
    plan: float
    uniform: float | None
    best: float | None

    @property
    def worse(self) -> bool:
        """Whether uniform widths of that size are predicted to be better, and some plan of one width a layer is too.

        Between two whole widths uniform is an interpolation, which no plan need reach.
        """
        return self.beaten and self.best is not None and self.plan > WORSE * self.best

    @property
    def beaten(self) -> bool:
        """Whether uniform widths of that size are."""
        return self.uniform is not None and self.plan > WORSE * self.uniform

    def text(self) -> str:
        """Say it in one line, with the numbers.

        Returns:
            The line.
        """
        said = [f"predicted {self.sensitivity} at {self.average_bits:.3f} bits in total: {self.plan:.4g}"]
        if self.uniform is not None:
            said.append(f"uniform widths of that size {self.uniform:.4g}")
        if self.best is not None:
            said.append(f"the best width for each layer {self.best:.4g}")
        return ", ".join(said)


def judge_of(table: LayerTable, plans: Iterable[Plan], asked: str | None = None) -> str | None:
    """Name the sensitivity that plans of one table are judged on, the same for all of them.

    It is the first there is of kl, distance, mse and relative; where some plan has parts and that one is not known by
    channel, it is split by another, as in kl*mse.

    Args:
        table: What was measured.
        plans: Those that are to be compared.
        asked: The judge that the user wants instead.

    Returns:
        The name, or None where the table has none of them. What it cannot tell of a plan's parts, `predicted` says.

    Raises:
        SettingError: `asked` was not measured.
    """
    if asked is not None:
        check(table, asked)
        return asked
    has = (*table.sensitivities, *table.metrics)
    first = next((name for name in FIRST_CHOICE if name in has), None)
    whole = all(layer.parts is None for plan in plans for layer in plan.layers)
    if first is None or whole or _by_channel(table, first):
        return first
    split = next((name for name in SPLITS if name in has and _by_channel(table, name)), None)
    return first if split is None else f"{first}*{split}"


def compare(table: LayerTable, plan: Plan, sensitivity: str | None = None) -> Comparison | None:
    """Set a plan against uniform widths, and against Budget per layer, at its own size in total.

    Args:
        table: The measured layers.
        plan: A plan made from it.
        sensitivity: The judge, an error or sensitivity of the table, or two as in `kl*mse`; by default what `judge_of`
            names.

    Returns:
        The costs; None where the table cannot tell (other widths, another scheme, parts without numbers per channel),
        and for inputs of several widths, to which some of the plan's bits went.

    Raises:
        SettingError: The sensitivity was not measured.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> table = mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)))
        >>> mpq.compare(table, mpq.Uniform(bits=4)(table)).worse
        False
    """
    check_table(table)
    check_plan(plan)
    comparison = _beside_uniform(table, plan, sensitivity)
    return None if comparison is None else _with_best(table, comparison)


def warn_if_worse(table: LayerTable, plan: Plan) -> None:
    """Warn with PlanWarning of a plan that is predicted to be worse than uniform widths of its size."""
    if _unheard():
        return  # plans are made by the dozen where something else says it, and comparing takes as long as making
    comparison = _beside_uniform(table, plan, None)
    if comparison is None or not comparison.beaten:
        return  # as most plans do, which should cost next to nothing
    comparison = _with_best(table, comparison)
    if comparison.worse:
        warnings.warn(worse_text(plan, comparison), PlanWarning, stacklevel=4)


def _unheard() -> bool:
    """Whether the first filter of warnings ignores every PlanWarning, wherever it comes from."""
    action, message, category, module, line = warnings.filters[0] if warnings.filters else ("default", *[None] * 4)
    everywhere = message is None and module is None and not line
    return action == "ignore" and everywhere and isinstance(category, type) and issubclass(PlanWarning, category)


def worse_text(plan: Plan, comparison: Comparison) -> str:
    """What is wrong with the plan, and what to do."""
    return (
        f"this {plan.allocator.name} plan is predicted to be worse than uniform widths: {comparison.text()}. Other "
        f"parameters may do better, and "
        f"Budget(total_average_bits={comparison.average_bits:.3f}, sensitivity={comparison.sensitivity!r}) does"
    )


def _by_channel(table: LayerTable, name: str) -> bool:
    return name in table.channel_sensitivities or any(name in layer.channel_errors for layer in table.layers[:1])


@dataclass(frozen=True)
class _Whole:
    """What one width per layer takes in total and is predicted to cost, (layers, widths), for every width measured.

    bests: the least cost within each size that was asked before: a plan is compared as it is made, and as it is shown.
    """

    widths: Mapping[int, int]
    names: Sequence[str]
    sizes: NDArray[np.float64]
    costs: NDArray[np.float64]
    bests: dict[int, float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, table: LayerTable, name: str) -> "_Whole":
        """Worked out once for a table, for as long as it lives: ten plans should cost hardly more than one."""
        known = _KNOWN.setdefault(table, {})
        if name not in known:
            from .choices import layer_choice

            # Those of the table that its scheme has codes of.
            widths = [b for b in table.bits if has_width(table.scheme, b)]
            sizes = [[layer_size(layer_choice(layer, b, table.scheme)).total for b in widths] for layer in table.layers]
            costs = [layer_curve(table, layer, name, widths) for layer in table.layers]
            known[name] = cls(
                {b: k for k, b in enumerate(widths)}, [layer.name for layer in table.layers],
                np.array(sizes, np.float64).reshape(-1, len(widths)), np.array(costs).reshape(-1, len(widths)),
            )  # fmt: skip
        return known[name]

    def priced(self, table: LayerTable, plan: Plan) -> tuple[int, float] | None:
        """Size in total and predicted cost of a plan of the table's layers with one known width each; else None."""
        if [layer.name for layer in plan.layers] != self.names:
            return None
        pairs = zip(plan.layers, table.layers, strict=True)
        options = [self.widths.get(layer.bits or 0) for layer, of in pairs if layer.scheme == table.scheme_of(of)]
        if None in options or len(options) < len(self.names):
            return None
        chosen = np.arange(len(self.names)), np.array(options, np.int64)
        return int(self.sizes[chosen].sum()), math.fsum(self.costs[chosen])

    def uniform_cost(self, bits: int) -> float | None:
        """What uniform widths of that size in total cost."""
        points = sorted(zip(self.sizes.sum(axis=0).tolist(), map(math.fsum, self.costs.T), strict=True))
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

    def best_cost(self, bits: int) -> float | None:
        """The least cost within that size in total, exact for a few hundred layers; None where nothing fits."""
        from .knapsack import Problem, solve

        if bits in self.bests:
            return self.bests[bits]
        problem = Problem(self.costs.T, self.sizes.T[None], np.array([float(bits)]))
        solution = solve(problem, close=len(self.names) <= FEW_LAYERS)
        self.bests[bits] = None if solution is None else solution.cost
        return self.bests[bits]


_KNOWN: WeakKeyDictionary[LayerTable, dict[str, _Whole]] = WeakKeyDictionary()


def _beside_uniform(table: LayerTable, plan: Plan, sensitivity: str | None) -> Comparison | None:
    """The comparison but for the best plan, which takes longer."""
    name = judge_of(table, (plan,), sensitivity)
    if name is None or len({layer.activation_bits for layer in plan.layers} - {None}) > 1:
        return None
    whole = _Whole.of(table, name)
    size, cost = whole.priced(table, plan) or (plan.size().total_bits, predicted(table, plan, name))
    if cost is None or not math.isfinite(cost):
        return None
    average = size / max(1, sum(layer.numel for layer in plan.layers))
    return Comparison(name, size, average, cost, whole.uniform_cost(size), None)


def _with_best(table: LayerTable, comparison: Comparison) -> Comparison:
    return replace(comparison, best=_Whole.of(table, comparison.sensitivity).best_cost(comparison.total_bits))
