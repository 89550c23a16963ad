"""Steps that meet a budget of a file's bytes: round, write, count what the file takes, and correct the steps."""

import logging
import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..common.amounts import bytes_of
from ..common.checks import number
from ..common.progress import Progress
from ..common.public import public
from ..errors import SettingError
from ..models.running import checked_batches, sample_count
from ..plans.names import layer_name
from ..plans.plan import Plan
from ..plans.steps import steps_of, with_steps
from ..reconstruction.compensate import compensate
from .container import Container
from .write import write

LOG = logging.getLogger(__name__)

TRIES = 6
CLOSE = 0.005  # below what was asked, as a share: near enough
SLOPE = 0.85  # bits a weight that an octave of the step saves at one or two bits, for the first correction
LEAST_SHARE = 0.05  # of the way from one try to another, so that no factor is tried again
FLATTER = 25  # times, at the most: where most weights were pruned, what is left to code is where the others are
FEW_SAMPLES, FEW_COLUMNS = 128, 1 << 13  # that tell what compensated codes take
SEALING = 2  # writes with the promise in it, which then holds to a byte or two
ROOM = 0.002  # left below what is asked, for what all samples change


@public
@dataclass(frozen=True)
class FittedFile:
    """A model and a plan that meet a budget of a file's bytes.

    Attributes:
        model: What to write by the plan: the source, or with inputs a float copy whose weights are on the plan's grids
            already.
        plan: The plan, with the steps that were found and what the file takes.
        file_bytes: Bytes of the container that `compress` writes of them.
        file_bits: The same less other tensors, in bits for each planned weight.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(256, 256))
        >>> fitted = mpq.fit_file(net, mpq.Budget(file_size="24kB")(mpq.measure(net, mpq.EntropyCoded())))
        >>> mpq.compress(fitted.model, fitted.plan, "net.mpqc").size == fitted.file_bytes <= 24_000
        True
    """

    model: Any
    plan: Plan
    file_bytes: int
    file_bits: float


def fit_file(  # noqa: PLR0913  # each option is a user's word
    source: nn.Module | str | Path,
    plan: Plan,
    batches: Iterable[Any] | None = None,
    *,
    file_bits: float | None = None,
    file_size: int | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    model: nn.Module | None = None,
    weights: str | None = None,
) -> FittedFile:
    """Scale a plan's steps until the container takes what is asked, and not more.

    The plan is `Budget(file_bits=...)`'s or `Budget(file_size=...)`'s. Its steps come from the entropies of the float
    weights, and what a file takes also depends on how they are rounded and on its coder: so the file is written, its
    bytes are counted, and the steps corrected, three or four times. With inputs weights are compensated (`compensate`),
    which takes a few seconds a try on few samples, and then once on all.

    Args:
        source: A module, or without inputs a checkpoint.
        plan: The plan, whose layers have steps.
        batches: Inputs without labels, as for `compensate`.
        file_bits: Bits of each planned weight: all bytes of the container but other tensors'. By default what the plan
            was made for.
        file_size: Or bytes of the whole container, a number or as `60kB`.
        seed: As for `compensate`.
        progress: Called with what is being done, tries done and tries at the most.
        model: Of a checkpoint, the module it is of, as in `compress`.
        weights: Of a torch checkpoint, the key of the weights, as in `compress`.

    Returns:
        The model to write, the plan to write it by, and what the file takes.

    Raises:
        SettingError: The plan has no steps, nothing is asked or what is cannot be met.
        MismatchError: The plan is another model's.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(256, 256))
        >>> plan = mpq.Budget(file_bits=2)(mpq.measure(net, mpq.EntropyCoded()))
        >>> fitted = mpq.fit_file(net, plan)
        >>> 1.98 < fitted.file_bits <= 2
        True
    """
    target = _Target.of(plan, file_bits, file_size)
    if not steps_of(plan):
        raise SettingError("plan: none of its layers has a step; make it with Budget(file_bits=...) or (file_size=...)")
    if batches is None:
        search = _Search(source, target, model, weights)
        return search.fitted(plan, None, progress)
    if not isinstance(source, nn.Module):
        raise SettingError("batches: a checkpoint's file does not run; give the module itself")
    given = checked_batches(batches)
    pilot = _Search(source, replace(target, most=target.most * (1 - ROOM)), model, weights, says=False)
    few = list(_few(given))
    close = pilot.fitted(plan, _Compensation(few, FEW_COLUMNS, seed), progress)
    whole = _Search(source, target, model, weights)
    return whole.fitted(close.plan, _Compensation(given, 1 << 16, seed), progress)


@dataclass(frozen=True)
class _Compensation:
    batches: Sequence[Any]
    columns: int
    seed: int


@dataclass(frozen=True)
class _Target:
    """What is asked: in bits of each planned weight, or bytes of the file."""

    most: float
    in_bits: bool

    @classmethod
    def of(cls, plan: Plan, file_bits: float | None, file_size: int | str | None) -> "_Target":
        """What is asked here, or was of the plan. Raises SettingError."""
        if file_bits is not None and file_size is not None:
            raise SettingError("file_bits and file_size are one limit; give one of them")
        if file_bits is None and file_size is None:
            file_bits, file_size = (plan.allocator.parameters.get(name) for name in ("file_bits", "file_size"))
        if file_bits is not None:
            return cls(number("file_bits", file_bits, "a number above 0", above=0.0), True)
        if file_size is not None:
            return cls(float(bytes_of(file_size, "file_size")), False)
        raise SettingError("the plan was not made for a file's bytes, and none are asked; give file_bits or file_size")

    def taken(self, container: Container) -> float:
        """What of it a file takes."""
        return container.file_bits if self.in_bits else float(container.size)


@dataclass(frozen=True)
class _Tried:
    """A try: log2 of the steps' factor, what of the target it takes, what came of it and what was warned of."""

    octaves: float
    taken: float
    fitted: FittedFile
    said: tuple[warnings.WarningMessage, ...]


@dataclass(frozen=True)
class _Search:
    """Looks for the factor of a plan's steps at which its file takes what is asked. says: whether warnings are handed
    on, those of the try that is taken."""

    source: Any
    target: _Target
    model: nn.Module | None
    weights: str | None
    says: bool = True

    def fitted(self, plan: Plan, compensation: _Compensation | None, progress: Progress | None) -> FittedFile:
        """The finest steps found whose file is within the target. Raises SettingError where none is."""
        tried: list[_Tried] = []
        octaves = 0.0
        for attempt in range(TRIES):
            if progress is not None:
                progress("fitting steps", attempt, TRIES)
            tried.append(self._try(plan, octaves, compensation))
            LOG.info("steps x %.4g: %.5g of %.5g", 2**octaves, tried[-1].taken, self.target.most)
            if self._close(tried[-1]):
                break
            octaves = self._next(tried)
        if progress is not None:
            progress("", TRIES, TRIES)
        within = [one for one in tried if one.taken <= self.target.most]
        if not within:
            unit = "bits a weight" if self.target.in_bits else "bytes"
            raise SettingError(
                f"file: no steps were found that take at most {self.target.most:g} {unit}; the least that was reached "
                f"is {min(one.taken for one in tried):g}. Ask for a larger file"
            )
        best = max(within, key=lambda one: one.taken)
        for one in best.said if self.says else ():
            warnings.warn(one.message, stacklevel=4)
        if self._close(best):
            return best.fitted
        return self._sealed(best.fitted, self._written(best.fitted.model, best.fitted.plan))

    def _close(self, one: _Tried) -> bool:
        return (1 - CLOSE) * self.target.most <= one.taken <= self.target.most

    def _next(self, tried: Sequence[_Tried]) -> float:
        """The next factor, aimed at the middle of what is near enough: between the nearest tries on either side of it,
        or beyond the last of those on one side, by the slope that they have."""
        aim = (1 - CLOSE / 2) * self.target.most
        over, under = ([one for one in tried if (one.taken > aim) == above] for above in (True, False))
        if over and under:
            here, other = max(over, key=lambda one: one.octaves), min(under, key=lambda one: one.octaves)
            share = math.log(here.taken / aim) / math.log(here.taken / other.taken)
            return here.octaves + min(max(LEAST_SHARE, share), 1 - LEAST_SHARE) * (other.octaves - here.octaves)
        *before, here = sorted(tried, key=lambda one: one.octaves, reverse=not over)
        slope = -SLOPE / max(here.fitted.file_bits, 0.1)  # of log2(taken), for each octave
        if before:
            found = math.log2(here.taken / before[-1].taken) / (here.octaves - before[-1].octaves)
            slope = min(found, slope / FLATTER)
        return here.octaves + max(-1.0, min(1.0, math.log2(aim / here.taken) / slope))

    def _try(self, plan: Plan, octaves: float, compensation: _Compensation | None) -> _Tried:
        steps = {name: step * 2**octaves for name, step in steps_of(plan).items()}
        scaled = with_steps(plan, steps, {layer.name: layer.coded_bytes for layer in plan.layers})
        model, said = self.source, []
        if compensation is not None:
            free = with_steps(scaled, steps, dict.fromkeys(steps, None))  # rounded as is best, whatever it takes
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                model = compensate(
                    self.source, free, compensation.batches, columns=compensation.columns, seed=compensation.seed
                )
        container = self._written(model, scaled)
        found = FittedFile(model, scaled, container.size, container.file_bits)
        if self._near(container):
            found = self._sealed(found, container)
        taken = found.file_bits if self.target.in_bits else float(found.file_bytes)
        return _Tried(octaves, taken, found, tuple(said))

    def _sealed(self, found: FittedFile, container: Container) -> FittedFile:
        """With the plan's promise, which stands in the header and takes bytes itself."""
        plan = found.plan
        for _ in range(SEALING):
            plan = with_promise(plan, container)
            container = self._written(found.model, plan)
        return FittedFile(found.model, plan, container.size, container.file_bits)

    def _near(self, container: Container) -> bool:
        return (1 - 2 * CLOSE) * self.target.most <= self.target.taken(container) <= self.target.most

    def _written(self, model: Any, plan: Plan) -> Container:
        """The container, whose file is gone again."""
        with tempfile.TemporaryDirectory() as folder:
            return write(
                model, plan, Path(folder) / "fitted.mpq", prune=None, coding="smallest", progress=None,
                model=self.model, weights=self.weights,
            )  # fmt: skip


def with_promise(plan: Plan, container: Container) -> Plan:
    """The plan with what its layers and the file take in a container of it."""
    blocks = {
        layer_name(record.name): record.block_bytes for record in container.header.tensors if record.parts is not None
    }
    taken = {layer.name: sum(blocks.get(name, 0) for name in layer.names) for layer in plan.layers}
    promised = with_steps(plan, steps_of(plan), taken)
    found = {**plan.allocator.found, "file_bits": round(container.file_bits, 4), "file_bytes": container.size}
    return promised.model_copy(update={"allocator": plan.allocator.model_copy(update={"found": found})})


def _few(batches: Sequence[Any]) -> Iterator[Any]:
    """The first of the batches, of so many samples where that can be seen."""
    left = FEW_SAMPLES
    for batch in batches:
        if left <= 0:
            return
        yield batch
        left -= sample_count(batch)
