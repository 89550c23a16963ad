"""Steps that meet a budget of a file's bytes: round, write, count what the file takes, and correct the steps."""

import logging
import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..common.amounts import bytes_of
from ..common.checks import number
from ..common.progress import Progress, check_callbacks
from ..common.public import public
from ..errors import CompressWarning, RoundingWarning, SettingError, SourceError
from ..models.arguments import check_source
from ..models.running import checked_batches, sample_count
from ..plans.arguments import check_plan
from ..plans.entropy_coded import LEAST_STEP, EntropyCoded
from ..plans.plan import Plan
from ..plans.steps import steps_of, with_steps
from ..quantization.ladder import largest_magnitude
from ..reconstruction.compensate import compensated_with_notes
from ..simulation.match import match
from ..weights.chunks import over_chunks
from .container import Container
from .step_search import Point, StepSearch
from .write import write

LOG = logging.getLogger(__name__)

TRIES = 14
LACKING = 0.02  # of what codes take: more that is left of what is asked is said
CLOSE, NEAR = 0.005, 0.015  # below what was asked, as a share: near enough, and so for what takes long
FEW_SAMPLES, FEW_COLUMNS = 128, 1 << 13  # that tell what compensated codes take
SEALING = 2  # writes with the promise in it, which then holds to a byte or two
BEYOND = 0.018  # of what is asked, at one bit a weight, that few samples' codes take more than all samples' do
INFLATED = 0.35  # octaves that steps are coarser where compensated codes take what the float weights' nearest ones do


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
    executor: Executor | None = None,
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
        executor: As for `compensate`.
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
    check_source(source)
    check_plan(plan)
    check_callbacks(progress=progress)
    target = _Target.of(plan, file_bits, file_size)
    if not steps_of(plan):
        raise SettingError("plan: none of its layers has a step; make it with Budget(file_bits=...) or (file_size=...)")
    if batches is not None and not isinstance(source, nn.Module):
        raise SettingError("batches: a checkpoint's file does not run; give the module itself")
    whole = _Search(source, target, finest_steps(source, plan, model, weights), model, weights)
    if batches is None:
        return whole.fitted(plan, None, progress)
    given = checked_batches(batches)
    pilot = replace(
        whole, target=replace(target, most=target.most * _beyond(plan)), pilot=True, close=CLOSE * 2, total=2 * TRIES
    )
    close = pilot.fitted(plan, _Compensation(list(_few(given)), FEW_COLUMNS, seed, executor), progress, INFLATED)
    whole = replace(whole, close=NEAR, before=TRIES, total=2 * TRIES)
    return whole.fitted(close.plan, _Compensation(given, 1 << 16, seed, executor), progress)


def _beyond(plan: Plan) -> float:
    """What few samples' codes may take, as a ratio to what is asked; at more bits they are nearer to all samples'."""
    bits = plan.allocator.found.get("file_bits")
    return 1 + BEYOND / max(1.0, bits if isinstance(bits, float) else 1.5) ** 2


@dataclass(frozen=True)
class _Compensation:
    batches: Sequence[Any]
    columns: int
    seed: int
    executor: Executor | None


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
    """What came of a try: the point it is, the result, what was warned of, and whether the plan has its promise."""

    point: Point
    fitted: FittedFile
    notes: tuple[str, ...]
    sealed: bool


@dataclass(frozen=True)
class _Search:
    """Looks for the factor of a plan's steps at which its file takes what is asked.

    finest: the finest step of each layer; pilot: whether it only finds where to begin, which is nothing to warn of or
    to refuse; close: below the target, as a share, what is near enough; before, total: tries that progress counts
    before these, and in all.
    """

    source: Any
    target: _Target
    finest: Mapping[str, float]
    model: nn.Module | None
    weights: str | None
    pilot: bool = False
    close: float = CLOSE
    before: int = 0
    total: int = TRIES

    def fitted(
        self, plan: Plan, compensation: _Compensation | None, progress: Progress | None, octaves: float = 0.0
    ) -> FittedFile:
        """The finest steps found whose file is within the target. Raises SettingError where none is."""
        search = self._begun(plan)
        best: _Tried | None = None
        for attempt in range(TRIES):
            if progress is not None:
                progress("fitting steps", self.before + attempt, self.total)
            one = self._try(plan, octaves, compensation)
            LOG.info("steps x %.4g: %.5g of %.5g", 2**octaves, one.point.taken, self.target.most)
            search.add(one.point)
            best = self._better(one, best)
            if search.settled:
                break
            octaves = search.next()
        if progress is not None:
            progress("", self.before + TRIES, self.total)
        assert best is not None
        return best.fitted if self.pilot else self._finished(best, search)

    def _begun(self, plan: Plan) -> StepSearch:
        steps, weights = steps_of(plan), max(1, sum(layer.numel for layer in plan.layers))
        known = [math.log2(self.finest[name] / step) for name, step in steps.items() if self.finest.get(name, 0) > 0]
        per_bit = 1.0 if self.target.in_bits else weights / 8
        return StepSearch(self.target.most, self.close, min(known, default=0.0), per_bit)

    def _better(self, one: _Tried, best: _Tried | None) -> _Tried:
        """The one that takes more within the target; of those beyond it the one that takes less."""
        if best is None:
            return one
        most = self.target.most
        ranks = [(tried.point.taken <= most, -abs(most - tried.point.taken)) for tried in (best, one)]
        return one if ranks[1] > ranks[0] else best

    def _finished(self, best: _Tried, search: StepSearch) -> FittedFile:
        """The best try with its promise, and what is to be said of it. Raises SettingError where it takes too much."""
        taken, most = best.point.taken, self.target.most
        unit = "bits a weight" if self.target.in_bits else "bytes"
        if taken > most:
            raise SettingError(
                f"file: no steps were found that take at most {most:g} {unit}; the least that was reached is "
                f"{taken:g}. Ask for a larger file"
            )
        for note in best.notes:
            warnings.warn(RoundingWarning(note), stacklevel=4)
        if most - taken > LACKING * search.per_bit * best.point.file_bits:
            why = f"no nearer steps were found in {TRIES} tries"
            if best.point.octaves <= search.finest:
                why = "all steps are the finest that int8 codes have"
            elif search.settled:
                why = "codes change all at once between the nearest steps"
            warnings.warn(CompressWarning(f"the file takes {taken:.6g} of {most:.6g} {unit}: {why}"), stacklevel=4)
        if best.sealed:
            return best.fitted
        return self._sealed(best.fitted, self._file(best.fitted.model, best.fitted.plan))

    def _try(self, plan: Plan, octaves: float, compensation: _Compensation | None) -> _Tried:
        steps = {name: max(step * 2**octaves, self.finest.get(name, 0.0)) for name, step in steps_of(plan).items()}
        scaled = with_steps(plan, steps, {layer.name: layer.coded_bytes for layer in plan.layers})
        model, notes = self.source, tuple[str, ...]()
        if compensation is not None:
            free = with_steps(scaled, steps, dict.fromkeys(steps, None))  # rounded as is best, whatever it takes
            model, said = compensated_with_notes(
                self.source,
                free,
                compensation.batches,
                columns=compensation.columns,
                seed=compensation.seed,
                executor=compensation.executor,
            )
            notes = tuple(said)
        container = self._file(model, scaled)
        found = FittedFile(model, scaled, container.size, container.file_bits)
        sealed = not self.pilot and (1 - 2 * self.close) * self.target.most <= self.target.taken(container)
        if sealed:
            found = self._sealed(found, container)
        taken = found.file_bits if self.target.in_bits else float(found.file_bytes)
        return _Tried(Point(octaves, taken, found.file_bits), found, notes, sealed)

    def _sealed(self, found: FittedFile, container: Container) -> FittedFile:
        """With the plan's promise, which stands in the header and takes bytes itself."""
        plan = found.plan
        for _ in range(SEALING):
            plan = with_promise(plan, container)
            container = self._file(found.model, plan)
        return FittedFile(found.model, plan, container.size, container.file_bits)

    def _file(self, model: Any, plan: Plan) -> Container:
        return written_once(model, plan, self.model, self.weights)


def finest_steps(
    source: nn.Module | str | Path, plan: Plan, model: nn.Module | None = None, weights: str | None = None
) -> dict[str, float]:
    """The finest step of each layer that has one; reads its weights once. Raises as `match`."""
    found = match(plan, source, rewrapped=True, key=weights, model=model)
    named = found.require(type(source).__name__ if isinstance(source, nn.Module) else str(source))
    here = {name: known for known, layer in zip(plan.layers, named.layers, strict=True) for name in layer.names}
    steps, finest = steps_of(plan), dict[str, float]()
    for weight in found.present:
        known = next((here[name] for name in weight.names if name in here), None)
        if known is not None and known.name in steps and isinstance(known.scheme, EntropyCoded):
            largest = largest_magnitude(over_chunks(weight))
            finest[known.name] = max(known.scheme.finest_step(largest), LEAST_STEP)
    return finest


def written_once(
    source: nn.Module | str | Path, plan: Plan, model: nn.Module | None = None, weights: str | None = None
) -> Container:
    """The container of a source under a plan, whose file is gone again: it says what it took. Raises as `compress`."""
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise SourceError(f"file: there is no folder for a file to be counted in ({error}); set TMPDIR") from error
    with folder as place:
        return write(
            source, plan, Path(place) / "once.mpq", prune=None, coding="smallest", progress=None, model=model,
            weights=weights,
        )  # fmt: skip


def with_promise(plan: Plan, container: Container) -> Plan:
    """The plan with what its layers and the file take in a container of it."""
    # In one order, for the source may call its layers otherwise.
    taken = {layer.name: one for layer, one in zip(plan.layers, container.layer_bytes.values(), strict=True)}
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
