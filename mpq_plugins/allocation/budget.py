"""Budget: the plan of least predicted cost under a size, an average, bit operations or a latency, or several of them.

    minimise  sum_l S[l, b_l]   subject to   sum_l cost_m[l, b_l] <= limit_m  for every limit m

over the widths of layers, solved exactly, or of output channels, to parts in a million (knapsack.py); where channel-to-
part maps count too, to a few hundredths of a percent (parts_solve.py). The gap is against a bound that counts maps.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..common.amounts import bytes_of
from ..common.progress import Progress
from ..common.public import public
from ..common.settings import settings
from ..errors import SettingError
from ..plans.affine import Affine
from ..plans.arguments import check_any_table
from ..plans.entropy_coded import EntropyCoded
from ..plans.granular import FLOAT_BITS
from ..plans.plan import Plan
from ..plans.scheme import Scheme
from ..plans.stats import METRICS
from ..plans.steps import with_steps
from ..plans.table import LayerTable
from ..plans.type_table import TypeTable
from .budget_fields import Bytes, Costs, Ends, InputBits, Most, Name, Pins, Size, Ties, names_type
from .budget_problem import Layout, Rules, pinned_widths
from .choices import layer_choice
from .contract import Needs
from .fields import Candidates, Width
from .file_steps import steps_for_bits, steps_for_size
from .joint import JointLayout, planned_inputs
from .joint_inputs import Inputs
from .joint_limits import PairLimit, average_limit, bytes_limit, joint_bops, memory_limits, values_of
from .latency import LatencyTable
from .limits import Limit, bops_limit, code_limit, latency_limit, model_limit, numel, total_limit
from .make import make_plan, plan_of
from .objective import parts_of
from .typed import typed_layout
from .watch import Watch

Array = NDArray[np.float64]

SIZES = ("average_bits", "total_average_bits", "size_bytes", "weights_only_bytes", "size")
FILES = ("file_bits", "file_size")
OF_INPUTS = ("activation_average_bits", "activation_bytes", "activation_memory")
LIMITS = (*SIZES, "bops", "latency_limit", *FILES, *OF_INPUTS)
BOPS_ACTIVATION_BITS = 8
FILE_WIDTHS = (4, 8)  # at which a sensitivity says what squared error costs in each layer
NOT_BESIDE = ("bits", "input_bits", "parts", "pin", "tie", "ends", "time_limit")
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


@public
@settings
class Budget:
    """The least predicted cost within every limit that is given; at least one of them is.

    Limits on average bits, size_bytes and weights_only_bytes count the planned layers, those pinned to 16 or 32 bits
    among them, and nothing else.

    With input_bits each layer gets a width of weights and one of its input, together, from a table that
    `measure_activations` filled. What is kept low is the sum of what quantizing the weights alone and the input alone
    is predicted to cost. So the sensitivity is one that was measured of both and that adds up: a change of the
    network's output (`kl`, `distance`) or of the layer's own (`output_mse`); `kl*mse` splits both as mse says. `mse`
    alone is refused, for errors of weights and of inputs have different units. Layers that read the same tensor get one
    input width, as do tied layers. Layers pinned to 16 or 32 bits read their input in float, and limits count that
    width; embeddings read indices, which count nothing. An input of 16 bits has codes as any other. Each layer has one
    width then, and parts is False.

    Attributes:
        average_bits: Most bits a weight, codes alone, interval bits included: what papers quote.
        total_average_bits: Most bits a weight, with scales, zero points and channel-to-part maps.
        size: Most bytes of the whole model, a number or as `9MB`, `120kB` or `1.5MiB`. It counts what size_bytes
            counts, and skipped layers, biases, norms and buffers as they are stored (the table's rest_bytes). A
            correction that gives layers biases adds theirs.
        size_bytes: Most bytes, with scales, zero points and channel-to-part maps.
        weights_only_bytes: Most bytes of the codes alone.
        bops: Most multiply-accumulates x weight bits x activation bits, for tables with multiply-accumulates. With
            input_bits these are each layer's own.
        bops_activation_bits: Activation bits in bops, without input_bits.
        latency: A table layer -> bits -> cost, or a JSON file of one.
        latency_limit: Most of that table's cost, in its unit.
        file_bits: Bits a planned weight in the entropy-coded container: all of its bytes but those of other tensors.
            This and file_size take a table under `EntropyCoded`, and each alone: layers get steps instead of widths.
        file_size: Most bytes of the whole container, a number or as `60kB`.
        activation_average_bits: Most bits a value of layers' inputs, each tensor counted once. This and the next two go
            with input_bits.
        activation_bytes: Most bytes of all layers' inputs of one sample, each tensor counted once; a number or as
            `90kB`.
        activation_memory: Most bytes of the layers' inputs that one sample needs at once, of the table's `live` sets; a
            number or as `20kB`. What no planned layer reads, as the sum before an activation, is not counted.
        sensitivity: What is predicted, an error or sensitivity of the table (`mse`, `output_mse`, `kl`, ...). `kl*mse`
            takes each layer's scale from the first and the split inside it from the second.
        bits: The candidate widths.
        input_bits: The candidate widths of inputs, 2 to 16; None plans weights alone.
        parts: Whether channels of one layer may have different widths.
        pin: Layers whose width is given, as `conv1=8`: a glob, or `re:` and a regular expression. 16 or 32 bits leave
            them in float. With input_bits `conv1=8/4` gives its input 4 bits too.
        tie: Layers that must agree, as `*.{query,key,value}`, or `qkv` and `gate_up` for what engines fuse under any of
            its usual names, and `experts` for all experts of a layer. They get one width each layer.
        ends: Width of the first and last layer in the source's order, and of their inputs where these are planned.
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
    beside: ClassVar[dict[str, tuple[str, ...]]] = {
        "input_bits": OF_INPUTS, "bops": ("bops_activation_bits",), "latency": ("latency_limit",),
        "size_bytes": ("weights_only_bytes",),
    }  # fmt: skip

    average_bits: Annotated[Most | None, "most bits a weight, scales not counted"] = None
    total_average_bits: Annotated[Most | None, "most bits a weight in total"] = None
    size: Annotated[Size, "most bytes of the whole model, as 9MB"] = None
    size_bytes: Annotated[Bytes | None, "most bytes of planned layers, in total; more: --size-bytes 1 -h"] = None
    weights_only_bytes: Annotated[Bytes | None, "most bytes, scales not counted"] = None
    bops: Annotated[Most | None, "most MACs x weight bits x activation bits; more: --bops 1 -h"] = None
    bops_activation_bits: Annotated[Width, "activation bits in bops"] = BOPS_ACTIVATION_BITS
    latency: Annotated[Costs, "JSON file: layer -> bits -> cost; its limit: --latency FILE -h"] = None
    latency_limit: Annotated[Most | None, "most of the latency table's cost"] = None
    file_bits: Annotated[Most | None, "bits a weight in the entropy-coded file, header and all"] = None
    file_size: Annotated[Size, "most bytes of the entropy-coded file, as 60kB"] = None
    activation_average_bits: Annotated[Most | None, "most bits a value of layers' inputs"] = None
    activation_bytes: Annotated[Size, "most bytes of all layers' inputs of a sample, as 90kB"] = None
    activation_memory: Annotated[Size, "most bytes of inputs needed at once, as 20kB"] = None
    sensitivity: Annotated[Name, "error or sensitivity to keep low, as kl*mse"] = "mse"
    bits: Candidates = tuple(range(1, 9))
    input_bits: Annotated[InputBits | None, "candidate widths of inputs, planned too; limits: --input-bits 8 -h"] = None
    parts: Annotated[bool, "channels of one layer may differ in width"] = True
    pin: Annotated[Pins, "layers of a given width, GLOB=BITS[/INPUT]"] = ()
    tie: Annotated[Ties, "layers that must agree: '*.{q,k,v}', qkv, experts"] = ()
    ends: Annotated[Ends | None, "width of the first and the last layer"] = None
    time_limit: Annotated[Most | None, "seconds after which the best plan found is taken"] = None

    def __post_init__(self) -> None:
        if (self.latency is None) != (self.latency_limit is None):
            raise SettingError("latency and latency_limit belong together: a table of costs, and the most of them")
        if all(getattr(self, field) is None for field in LIMITS):
            raise SettingError(f"budget: no limit given; one or more of {', '.join(LIMITS)}")
        self._check_inputs()
        self._check_file()

    def _check_inputs(self) -> None:
        """Raise SettingError for what needs widths of inputs without any, or means nothing beside them."""
        if self.input_bits is None:
            for name in OF_INPUTS:
                if getattr(self, name) is not None:
                    raise SettingError(f"{name}: limits widths of inputs; say which there are by input_bits, as 2 to 8")
            for entry in self.pin:
                if not names_type(entry) and pinned_widths(entry)[2] is not None:
                    raise SettingError(f"pin: {entry!r} gives an input a width; plan inputs too, by input_bits")
            return
        if self.bops_activation_bits != BOPS_ACTIVATION_BITS:
            raise SettingError("bops_activation_bits: means nothing with input_bits, for bops counts each input's own")
        if not self._of_file:
            object.__setattr__(
                self, "parts", False
            )  # so that the plan's record says it, and nothing measures for parts

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
        given = {pinned_widths(entry)[1] for entry in self.pin if not names_type(entry)} | (
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
        check_any_table(table)
        watch = Watch(math.inf if self.time_limit is None else self.time_limit, progress)
        if isinstance(table, TypeTable):
            return self._solve_types(table, watch)
        if self._of_file:
            return self._solve_file(table)
        if self.input_bits is not None:
            return self._solve_joint(table, watch)
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
        if self.input_bits is not None:
            raise SettingError(
                "input_bits: inputs are planned beside weights' widths, and this is a table of types; give the plan's "
                "inputs widths afterwards (--activation-bits, Plan.with_activations)"
            )
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

    def _solve_joint(self, table: LayerTable, watch: Watch) -> Allocation:
        """A width for each layer's weights, and one for its input, exactly."""
        for b in self.bits:
            table.scheme.check_bits(b, "bits")
        rules = Rules(self.sensitivity, self.bits, False, self.pin, self.tie, self.ends, self.input_bits or ())
        inputs = Inputs.of(rules, table)
        layout = JointLayout(rules, table, inputs, tuple(self._joint_limits(table, inputs)))
        pairs, solution = layout.solved(watch)
        used: dict[str, tuple[float, float]] = {}
        for limit, amount in zip(layout.limits, layout.taken(pairs).tolist(), strict=True):
            most = max(limit.shown(amount), used.get(limit.name, (0.0, 0.0))[0])  # several sets are needed at once
            used[limit.name] = (most, limit.asked)
        gap, binding = solution.gap, layout.binding(pairs)
        found = {"objective": solution.cost, "gap": gap, "binding": list(binding)}
        layers = [layer_choice(layer, pairs[layer.name].bits, table.scheme) for layer in table.layers]
        plan = plan_of(table, self, layers, found).with_activations(planned_inputs(table, pairs))
        return Allocation(plan, solution.cost, gap, binding, used)

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

    def _joint_limits(self, table: LayerTable, inputs: Inputs) -> Iterator[PairLimit]:
        """The limits on weights and inputs."""
        yield from (PairLimit.of_weights(limit) for limit in self._weight_limits(table, table.scheme))
        if self.bops is not None:
            yield joint_bops(self.bops)
        if self.activation_average_bits is not None:
            most = _most(self.activation_average_bits, max(1, values_of(inputs)))
            yield average_limit(self.activation_average_bits, most, inputs)
        if self.activation_bytes is not None:
            yield bytes_limit(bytes_of(self.activation_bytes), inputs)
        if self.activation_memory is not None:
            yield from memory_limits(bytes_of(self.activation_memory), inputs, table)

    def _limits(self, table: LayerTable, scheme: Scheme) -> Iterator[Limit]:
        """The limits on the table's layers, as codes under a scheme count, beside inputs that are not planned."""
        yield from self._weight_limits(table, scheme)
        if self.bops is not None:
            yield bops_limit(self.bops, self.bops_activation_bits)

    def _weight_limits(self, table: LayerTable, scheme: Scheme) -> Iterator[Limit]:
        """The limits that inputs take nothing of."""
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
        if self.latency is not None and self.latency_limit is not None:
            yield latency_limit(self.latency_limit, LatencyTable.of(self.latency))


def _most(average: float, count: int) -> float:
    """The most bits that the average of `count` weights allows, to the bit."""
    most = math.floor(average * count) + 1
    while most / count > average:
        most -= 1
    return float(most)
