"""Budget: the plan of least predicted cost under a size, an average, bit operations or a latency, or several of them.

    minimise  sum_l S[l, b_l]   subject to   sum_l cost_m[l, b_l] <= limit_m  for every limit m

over the widths of layers, solved exactly, or of output channels, to parts in a million (knapsack.py); where channel-to-
part maps count too, to a few hundredths of a percent (parts_solve.py). The gap is against a bound that counts maps.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, ValidationInfo

from ..common.amounts import bytes_of
from ..common.checks import number
from ..common.progress import Progress
from ..common.public import public
from ..common.settings import settings
from ..errors import SettingError
from ..plans.entropy_coded import EntropyCoded
from ..plans.plan import Plan
from ..plans.scheme import FLOAT_BITS, Affine, Scheme
from ..plans.stats import METRICS
from ..plans.steps import with_steps
from ..plans.table import LayerTable
from ..plans.type_table import TypeTable
from .budget_problem import Layout, Rules, pinned_width, plan_bits
from .contract import Needs
from .fields import Candidates, Width, ranged
from .file_steps import steps_for_bits, steps_for_size
from .latency import LatencyTable
from .limits import Limit, bops_limit, code_limit, latency_limit, model_limit, numel, total_limit
from .make import make_plan, plan_of
from .objective import parts_of
from .typed import typed_layout
from .watch import Watch

Array = NDArray[np.float64]

LARGEST = 1e18
ABOVE_0 = f"a number above 0, at most {LARGEST:g}"
SIZES = ("average_bits", "total_average_bits", "size_bytes", "weights_only_bytes", "size")
FILES = ("file_bits", "file_size")
LIMITS = (*SIZES, "bops", "latency_limit", *FILES)
FILE_WIDTHS = (4, 8)  # at which a sensitivity says what squared error costs in each layer
NOT_BESIDE = ("bits", "parts", "pin", "tie", "ends", "time_limit")
NOT_OF_TYPES = ("bits", "ends", "latency", *FILES)


@public
@dataclass(frozen=True)
class Allocation:
    """What Budget found.

    Attributes:
        plan: The plan.
        objective: The plan's predicted cost, pinned layers included.
        gap: How far it is from the optimum at most, as a share of the objective.
        binding: The limits that keep some layer from more bits.
        used: What is used of each limit and what was asked, (used, asked) by name, in the unit that was asked in.
    """

    plan: Plan
    objective: float
    gap: float
    binding: tuple[str, ...]
    used: Mapping[str, tuple[float, float]]


def _bytes(value: Any, info: ValidationInfo) -> int:
    amount = number(str(info.field_name), value, ABOVE_0, above=0, most=LARGEST)
    if amount != int(amount):
        raise SettingError(f"{info.field_name}: {value!r} is not allowed; a whole number above 0")
    return int(value)


def _size(value: Any, info: ValidationInfo) -> int | None:
    return None if value is None else bytes_of(value, str(info.field_name))


def _latency(value: Any) -> LatencyTable | None:
    return None if value is None else LatencyTable.of(value)


def _name(value: Any) -> Any:
    parts_of(value)
    return value


def _several(value: Any) -> tuple[Any, ...]:
    """One, or a sequence of them."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _pins(value: Any) -> tuple[Any, ...]:
    entries = _several(value)
    for entry in entries:
        if not _names_type(entry):
            pinned_width(entry)
    return entries


def _names_type(entry: Any) -> bool:
    """Whether a pin gives a layer a type rather than a width; which types there are, the table knows."""
    pattern, _, word = str(entry).rpartition("=")
    return isinstance(entry, str) and bool(pattern.strip()) and word.strip().isidentifier()


def _ties(value: Any) -> tuple[Any, ...]:
    entries = _several(value)
    for entry in entries:
        if not isinstance(entry, str):
            raise SettingError(f"tie: {entry!r} is not allowed; names with alternatives, as '*.{{query,key,value}}'")
    return entries


def _ends(value: Any) -> int:
    return plan_bits("ends", value)


Most = Annotated[float, ranged(ABOVE_0, above=0, most=LARGEST)]
Bytes = Annotated[int, BeforeValidator(_bytes)]
Pins = Annotated[tuple[str, ...], BeforeValidator(_pins)]
Ties = Annotated[tuple[str, ...], BeforeValidator(_ties)]


@public
@settings
class Budget:
    """The least predicted cost within every limit that is given; at least one of them is.

    Limits on average bits, size_bytes and weights_only_bytes count the planned layers, those pinned to 16 or 32 bits
    among them, and nothing else.

    Attributes:
        average_bits: Most bits a weight, codes alone, interval bits included: what papers quote.
        total_average_bits: Most bits a weight, with scales, zero points and channel-to-part maps.
        size: Most bytes of the whole model, a number or as `9MB`, `120kB` or `1.5MiB`. It counts what size_bytes
            counts, and skipped layers, biases, norms and buffers as they are stored (the table's rest_bytes). A
            correction that gives layers biases adds theirs.
        size_bytes: Most bytes, with scales, zero points and channel-to-part maps.
        weights_only_bytes: Most bytes of the codes alone.
        bops: Most multiply-accumulates x weight bits x activation bits, for tables with multiply-accumulates.
        bops_activation_bits: Activation bits in bops.
        latency: A table layer -> bits -> cost, or a JSON file of one.
        latency_limit: Most of that table's cost, in its unit.
        file_bits: Bits a planned weight in the entropy-coded container: all of its bytes but those of other tensors.
            This and file_size take a table under `EntropyCoded`, and each alone: layers get steps instead of widths.
        file_size: Most bytes of the whole container, a number or as `60kB`.
        sensitivity: What is predicted, an error or sensitivity of the table (`mse`, `output_mse`, `kl`, ...). `kl*mse`
            takes each layer's scale from the first and the split inside it from the second.
        bits: The candidate widths.
        parts: Whether channels of one layer may have different widths.
        pin: Layers whose width is given, as `conv1=8`: a glob, or `re:` and a regular expression. 16 or 32 bits leave
            them in float.
        tie: Layers that must agree, as `*.{query,key,value}`, or `qkv` and `gate_up` for what engines fuse under any of
            its usual names, and `experts` for all experts of a layer. They get one width each layer.
        ends: Width of the first and last layer in the source's order.
        time_limit: Seconds after which the best plan found is taken, with the gap it has by then. Without it a plan
            does not depend on the machine.

    Raises:
        SettingError: Nothing is asked, or nonsense. When called: a table without what is needed, names that match
            nothing, or limits that cannot be met. The message says which limits, and by how much.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> table = mpq.measure(net, mpq.Affine(granularity="per_channel"), bits=range(1, 9))
        >>> mpq.Budget(average_bits=3, parts=False)(table).layers[0].bits
        3
    """

    name: ClassVar[str] = "budget"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"average_bits": (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)}
    one_of: ClassVar[tuple[str, ...]] = LIMITS
    usual: ClassVar[dict[str, float]] = {"average_bits": 4.0}

    average_bits: Annotated[Most | None, "most bits a weight, scales not counted"] = None
    total_average_bits: Annotated[Most | None, "most bits a weight in total"] = None
    size: Annotated[int | str | None, "most bytes of the whole model, as 9MB", BeforeValidator(_size)] = None
    size_bytes: Annotated[Bytes | None, "most bytes of the planned layers, in total"] = None
    weights_only_bytes: Annotated[Bytes | None, "most bytes, scales not counted"] = None
    bops: Annotated[Most | None, "most multiply-accumulates x weight bits x activation bits"] = None
    bops_activation_bits: Annotated[Width, "activation bits in bops"] = 8
    latency: Annotated[LatencyTable | str | None, "JSON file: layer -> bits -> cost", BeforeValidator(_latency)] = None
    latency_limit: Annotated[Most | None, "most of the latency table's cost"] = None
    file_bits: Annotated[Most | None, "bits a weight in the entropy-coded file, header and all"] = None
    file_size: Annotated[int | str | None, "most bytes of the entropy-coded file, as 60kB", BeforeValidator(_size)] = (
        None
    )
    sensitivity: Annotated[str, "error or sensitivity to keep low, as kl*mse", BeforeValidator(_name)] = "mse"
    bits: Candidates = tuple(range(1, 9))
    parts: Annotated[bool, "channels of one layer may differ in width"] = True
    pin: Annotated[Pins, "layers of a given width, GLOB=BITS"] = ()
    tie: Annotated[Ties, "layers that must agree: '*.{q,k,v}', qkv, experts"] = ()
    ends: Annotated[Annotated[int, BeforeValidator(_ends)] | None, "width of the first and the last layer"] = None
    time_limit: Annotated[Most | None, "seconds after which the best plan found is taken"] = None

    def __post_init__(self) -> None:
        if (self.latency is None) != (self.latency_limit is None):
            raise SettingError("latency and latency_limit belong together: a table of costs, and the most of them")
        if all(getattr(self, field) is None for field in LIMITS):
            raise SettingError(f"budget: no limit given; one or more of {', '.join(LIMITS)}")
        self._check_file()

    def _check_file(self) -> None:
        """Raise SettingError for what a budget of a file's bytes cannot be together with."""
        given = [name for name in LIMITS if getattr(self, name) is not None]
        if not self._of_file:
            return
        if len(given) > 1:
            raise SettingError(f"{' and '.join(given)} do not go together; a file's bytes are one limit, given alone")
        usual = {field.name: field.default for field in fields(self)}
        for name in NOT_BESIDE:
            if getattr(self, name) != usual[name]:
                raise SettingError(
                    f"{name}: means nothing with {given[0]}, which gives every layer a step; leave layers out by "
                    "measuring without them (skip)"
                )

    @property
    def _of_file(self) -> bool:
        return any(getattr(self, name) is not None for name in FILES)

    @property
    def needs(self) -> Needs:
        """What to measure: errors at the candidates and at pinned widths, per channel where parts are made."""
        if self._of_file:
            names = ("mse", *(name for name in parts_of(self.sensitivity) if name in METRICS))
            return Needs(FILE_WIDTHS, tuple(dict.fromkeys(names)), scheme=EntropyCoded())
        given = {pinned_width(entry)[1] for entry in self.pin if not _names_type(entry)} | (
            {self.ends} if self.ends is not None else set()
        )
        names = parts_of(self.sensitivity)
        return Needs(
            tuple(sorted({*self.bits, *(b for b in given if b not in FLOAT_BITS)})),
            tuple(name for name in names if name in METRICS),
            channel_errors=self.parts,
            scheme=Affine(granularity="per_channel", range="mse"),
        )

    def __call__(self, table: LayerTable | TypeTable) -> Plan:
        """Make the plan for a measured table; it records the objective, the gap and what binds.

        Args:
            table: The measured layers; of a table of types each layer gets one.

        Returns:
            The plan.

        Raises:
            SettingError: As `solve`.
        """
        return self.solve(table).plan

    def solve(self, table: LayerTable | TypeTable, progress: Progress | None = None) -> Allocation:
        """Find the plan, and say what is known of it.

        Args:
            table: The measured layers; of a table of types each layer gets one.
            progress: Called with what is being done, how many steps of it are, and how many there are at most, in a
                solve that takes more than a second.

        Returns:
            The plan with its objective, gap and limits.

        Raises:
            SettingError: The table lacks what is needed, a name matches nothing, or the limits cannot be met.

        Examples:
            >>> import mpq_plugins as mpq, torch
            >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
            >>> table = mpq.measure(net, mpq.Affine(granularity="per_channel"), bits=range(1, 9))
            >>> found = mpq.Budget(average_bits=3, parts=False).solve(table)
            >>> found.used["average_bits"], found.gap
            ((3.0, 3.0), 0.0)
        """
        watch = Watch(math.inf if self.time_limit is None else self.time_limit, progress)
        if isinstance(table, TypeTable):
            return self._solve_types(table, watch)
        if self._of_file:
            return self._solve_file(table)
        if self.parts and table.scheme.granularity == "per_tensor":
            raise SettingError(
                "parts: under per_tensor each part would have a scale of its own, whose error no table knows; measure "
                "per_channel, or give each layer one width (parts=False, --no-parts)"
            )
        for b in self.bits:
            table.scheme.check_bits(b, "bits")
        rules = Rules(self.sensitivity, self.bits, self.parts, self.pin, self.tie, self.ends)
        layout = Layout(rules, table, tuple(self._limits(table, table.scheme)))
        widths, solution = layout.solved(watch)
        used = {
            limit.name: (limit.shown(float(amount)), limit.asked)
            for limit, amount in zip(layout.limits, layout.taken(widths), strict=True)
        }
        objective = solution.cost + layout.pinned_cost
        gap = solution.gap * solution.cost / objective if objective else 0.0
        binding = layout.binding(widths)
        found = {"objective": objective, "gap": gap, "binding": list(binding)}
        return Allocation(make_plan(table, self, widths, found=found), objective, gap, binding, used)

    def _solve_types(self, table: TypeTable, watch: Watch) -> Allocation:
        """A type for each layer, exactly; there are no parts, for a type has none."""
        usual = {field.name: field.default for field in fields(self)}
        for name in NOT_OF_TYPES:
            if getattr(self, name) != usual[name]:
                raise SettingError(
                    f"{name}: means nothing with a table of types; choose the types where they are measured, and give "
                    "a layer its own by pin, as 'embed=int8'"
                )
        schemes = (*(kind.scheme for kind in table.types), table.base.scheme)
        limits = [tuple(self._limits(table.base, scheme)) for scheme in schemes]
        layout = typed_layout(table, self.sensitivity, limits, self.pin, self.tie)
        given, solution, pinned_cost = layout.solved(watch)
        pairs = zip(limits[0], layout.taken(given), strict=True)
        used = {limit.name: (limit.shown(float(amount)), limit.asked) for limit, amount in pairs}
        objective = solution.cost + pinned_cost
        gap = solution.gap * solution.cost / objective if objective else 0.0
        binding = layout.binding(given)
        found = {"objective": objective, "gap": gap, "binding": list(binding), "types": [k.name for k in table.types]}
        choices = [layout.choice(layer, given[layer.name]) for layer in table.base.layers]
        return Allocation(plan_of(table.base, self, choices, found), objective, gap, binding, used)

    def _solve_file(self, table: LayerTable) -> Allocation:
        """A step for each layer, and what its codes are predicted to take."""
        if self.file_bits is not None:
            name, asked = "file_bits", self.file_bits
            found = steps_for_bits(table, self.sensitivity, asked)
            used: float = found.file_bits
        else:
            name, asked = "file_size", bytes_of(self.file_size)
            found = steps_for_size(table, self.sensitivity, asked)
            used = float(found.file_bytes or 0)
        known: dict[str, Any] = {"objective": found.cost, "file_bits": round(found.file_bits, 4)}
        if found.finest:
            known["at_finest_step"] = list(found.finest)
        made = make_plan(
            table, self, dict.fromkeys(found.steps, 8), found={key: value for key, value in known.items() if value}
        )
        plan = with_steps(made, found.steps, found.coded_bytes)
        return Allocation(plan, found.cost, 0.0, () if len(found.finest) == len(found.steps) else (name,), {
            name: (used, float(asked))
        })  # fmt: skip

    def _limits(self, table: LayerTable, scheme: Scheme) -> Iterator[Limit]:
        """The limits on the table's layers, as codes under a scheme count."""
        count = max(1, numel(table))
        if self.average_bits is not None:
            most = _most(self.average_bits, count)
            yield code_limit("average_bits", self.average_bits, most, "bits", scheme, count)
        if self.total_average_bits is not None:
            most = _most(self.total_average_bits, count)
            yield total_limit("total_average_bits", self.total_average_bits, most, "bits", scheme, count)
        if self.size is not None:
            yield model_limit(bytes_of(self.size), table, scheme)
        if self.size_bytes is not None:
            yield total_limit("size_bytes", self.size_bytes, 8.0 * self.size_bytes, "bytes", scheme, 8)
        if self.weights_only_bytes is not None:
            most = 8.0 * self.weights_only_bytes
            yield code_limit("weights_only_bytes", self.weights_only_bytes, most, "bytes", scheme, 8)
        if self.bops is not None:
            yield bops_limit(self.bops, self.bops_activation_bits)
        if self.latency is not None and self.latency_limit is not None:
            yield latency_limit(self.latency_limit, LatencyTable.of(self.latency))


def _most(average: float, count: int) -> float:
    """The most bits that the average of `count` weights allows, to the bit."""
    most = math.floor(average * count) + 1
    while most / count > average:
        most -= 1
    return float(most)
