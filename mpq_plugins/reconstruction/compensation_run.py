"""One compensation: the walk of two nets, and what is done at each of its stations."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..common.progress import Progress
from ..common.text import first_few
from ..errors import SettingError
from ..models.kinds import quantizable_weights
from ..models.running import one_sample
from ..models.tracing import BATCH_NORMS, CONVOLUTIONS
from ..plans.plan import Plan
from ..simulation.layer import simulate_layer
from ..simulation.shifts import (
    Shift,
    by_channel,
    channel_axis_of_output,
    correctable,
    correction_targets,
    usual_vectors,
    with_bias,
)
from .blocks import learned_layers
from .call_sums import Given
from .candidates import EMBEDDING, SHARED, generator_of, later_calls, users_of, why_to_nearest
from .capture import call_order
from .finished import FinishedLayers
from .gram import Gram
from .round_layer import NO_BETTER, CannotCompensate, LayerRounding, Rounded
from .settings import Compensation, LayerReport
from .stations import Stations, find_stations
from .walk import Arrival, Station, Step, Walk

LOG = logging.getLogger(__name__)

SHRINKAGE = 0.5  # of a BatchNorm's variance, as in correct.py: best on both ResNets at 1.5 and 2 bits
LEAST_GAIN = 1e-3  # of a BatchNorm, by which what a shortcut lost is divided
UNREACHED = "no batch reaches it, or it is used without being called"
FEW = 0.1  # columns for each input of a layer, below which it is said that there are few


@dataclass
class CompensationRun:
    """One compensation. layers: those to compensate; nearest: why others are not; floats: weights to put back at the
    end, of what the plan rounds to nearest."""

    walk: Walk
    plan: Plan
    settings: Compensation
    kept: FinishedLayers | None
    layers: Mapping[str, nn.Module]
    weights: Mapping[str, Tensor]
    later: Mapping[str, Gram]
    nearest: dict[str, str]
    unreached: tuple[str, ...]
    few: list[str] = field(default_factory=list)
    floats: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, exact: nn.Module, rough: nn.Module, plan: Plan, batches: Sequence[Any], settings: Compensation,
        kept: FinishedLayers | None,
    ) -> "CompensationRun":  # fmt: skip
        """Find the layers and their stations, and round the others to nearest."""
        choices = plan.by_any_name
        planned = {name: module for name, module in learned_layers(rough, plan).items() if _has_weights(module)}
        nearest = {name: why for name, module in planned.items() if (why := why_to_nearest(module))}
        layers = {name: module for name, module in planned.items() if name not in nearest}
        corrected = correctable(exact, correction_targets(exact, plan), batches)
        norms = frozenset(name for name in corrected if isinstance(exact.get_submodule(name), BATCH_NORMS))
        users = users_of(rough, layers)
        biased = frozenset(
            name for name in corrected
            if name not in norms and _may_be_biased(exact.get_submodule(name), settings.new_biases)
        )  # fmt: skip
        names = [*norms, *biased, *(user for of_layer in users.values() for user in of_layer)]
        stations = _stations(exact, names, batches[0])
        unreached = [name for name in layers if not any(user in stations.calls for user in users[name])]
        if unreached:  # in one sample's run
            called = {user for batch in batches for user in call_order(exact, [*names], batch)}
            unreached = [name for name in unreached if called.isdisjoint(users[name])]
        biased -= stations.norms.keys()
        weights = {name: module.weight.detach().clone() for name, module in layers.items()}  # type: ignore[operator]
        for name in biased:
            with_bias(rough.get_submodule(name))
        walk = Walk(exact, rough, stations, users, biased, norms)
        later = later_calls(exact, layers, users, stations, batches, settings)
        job = cls(walk, plan, settings, kept, layers, weights, later, nearest, tuple(unreached))
        for name, weight in quantizable_weights(rough).items():
            if name in choices and name not in layers and weight.numel():
                job.floats[name] = weight.detach().clone()
                weight.copy_(simulate_layer(weight, choices[name]))
                if not choices[name].in_float:
                    nearest.setdefault(name, why_to_nearest(rough.get_submodule(name)) or SHARED)
        return job

    def run(
        self,
        batches: Sequence[Any],
        executor: Executor | None,
        progress: Progress | None,
        finished: Callable[[LayerReport], None] | None,
    ) -> None:
        """Walk, round and correct; then say what was rounded to nearest."""
        buffers = {name: buffer.clone() for name, buffer in self.walk.rough.named_buffers()}
        steps = [Station(name, step) for name in self.walk.stations.order for step in self._steps(name)]
        every = dict.fromkeys((*self.walk.stations.order, *self.layers, *self.walk.biased, *self.walk.norms))
        for station in [Station(name, step) for name in every for step in self._steps(name)]:
            self._resume(station, finished)
        self._unreached_to_nearest(self.unreached, finished)  # before what comes behind them is compensated

        def handle(station: Station, arrivals: Sequence[Arrival]) -> Any:
            if progress is not None:
                progress(station.name, len(self.walk.done), max(len(steps), len(self.walk.done) + 1))
            if station.step == Step.ROUND:
                self._round(station, arrivals, executor, finished)
                return None
            return self._correct(station, arrivals)

        self.walk.run(batches, handle)
        if progress is not None:
            progress("", len(steps), len(steps))
        self._unreached_to_nearest(self.layers, finished)
        self._leave_as_it_was(buffers)

    def _steps(self, name: str) -> list[Step]:
        """What is done at a module; a tied weight is rounded at whichever comes first, under its first name."""
        steps = ((Step.ROUND, self.layers), (Step.BIAS, self.walk.biased), (Step.NORM, self.walk.norms))
        return [step for step, names in steps if name in names]

    def _resume(self, station: Station, finished: Callable[[LayerReport], None] | None) -> None:
        """What a store has of a station is put into the quantized net, and the walk does not stop there."""
        stored = self.kept.read(_unit(station)) if self.kept is not None else None
        if stored is None:
            return
        tensors, report = stored
        module: Any = self.walk.rough.get_submodule(station.name)
        if station.step == Step.ROUND and "kept" in tensors:
            self.floats[station.name] = tensors.pop("kept")
        for name, value in tensors.items():
            getattr(module, name).copy_(value)
        self.walk.done.add(station)
        if report is not None:
            if report.why:
                self.nearest[station.name] = report.why
            if finished is not None:
                finished(report)

    def _keep(self, station: Station, tensors: Mapping[str, Tensor], report: LayerReport | None) -> None:
        if self.kept is not None:
            self.kept.write(_unit(station), tensors, report)

    def _round(
        self,
        station: Station,
        arrivals: Sequence[Arrival],
        executor: Executor | None,
        finished: Callable[[LayerReport], None] | None,
    ) -> None:
        name, start = station.name, time.perf_counter()
        module, weight = self.layers[name], self.weights[name]
        calls = [call for arrival in arrivals if (call := self._given(name, module, arrival)) is not None]
        rounding = LayerRounding(
            name,
            module,
            weight,
            self.plan.by_any_name[name],
            self.settings.columns,
            self.settings.damping,
            self.settings.outliers,
        )
        generator = generator_of(self.settings.seed, name)
        try:
            rounded = rounding.round(calls, self.later.get(name), generator, executor)
        except CannotCompensate as why:
            self._to_nearest(name, str(why), finished, start)
            return
        module.weight.copy_(rounded.weight)  # type: ignore[operator]
        tensors = {"weight": rounded.weight}
        if not rounded.kept.equal(rounded.weight):
            self.floats[name] = tensors["kept"] = rounded.kept
        if rounded.columns < FEW * rounded.inputs:
            self.few.append(f"{name!r} ({rounded.columns:,} for {rounded.inputs:,} inputs)")
        if rounded.lost:
            self.nearest[name] = f"{rounded.lost} of its channels, whose levels quantizing would not find again"
        report = self._report(name, rounded, self.nearest.get(name, ""), time.perf_counter() - start)
        self._keep(station, tensors, report)
        LOG.info("%s: %s, error %.4g, to nearest %.4g", name, rounded.target, rounded.compensated, rounded.nearest)
        if finished is not None:
            finished(report)

    def _to_nearest(
        self, name: str, why: str, finished: Callable[[LayerReport], None] | None, start: float | None = None
    ) -> None:
        module, weight = self.layers[name], self.weights[name]
        rounded = simulate_layer(weight, self.plan.by_any_name[name])
        module.weight.copy_(rounded)  # type: ignore[operator]
        self.floats[name], self.nearest[name] = weight, why
        report = self._report(name, None, why, 0.0 if start is None else time.perf_counter() - start)
        self._keep(Station(name, Step.ROUND), {"weight": rounded, "kept": weight}, report)
        if finished is not None:
            finished(report)

    def _unreached_to_nearest(self, names: Iterable[str], finished: Callable[[LayerReport], None] | None) -> None:
        """Those of these layers that nothing was done to, neither here nor in the run that this one goes on from."""
        for station in [Station(name, Step.ROUND) for name in names]:
            if station not in self.walk.done:
                self._to_nearest(station.name, UNREACHED, finished)
                self.walk.done.add(station)

    def _report(self, name: str, rounded: Rounded | None, why: str, seconds: float) -> LayerReport:
        weight = self.weights[name]
        if rounded is None:
            return LayerReport(name, "nearest", why, "", 0, 0.0, 0.0, 0.0, 0, weight.numel(), seconds)
        return LayerReport(
            name, "compensated", why, rounded.target, rounded.columns, rounded.damping, rounded.nearest,
            rounded.compensated, rounded.changed, weight.numel(), seconds,
        )  # fmt: skip

    def _given(self, name: str, module: nn.Module, arrival: Arrival) -> Given | None:
        """The arrival as a layer's call; None where the layer is given no tensor, or an empty one."""
        if not isinstance(arrival.rough, Tensor) or not arrival.rough.numel():
            return None
        # With several modules on one weight, which may have biases and shapes of their own, the weight is the target.
        alone = len(self.walk.users[name]) == 1
        exact = arrival.exact if isinstance(arrival.exact, Tensor) and alone else None
        return Given(arrival.rough, exact, self._lost(name, module, arrival))

    def _lost(self, name: str, module: nn.Module, arrival: Arrival) -> Tensor | None:
        """What the shortcut behind a convolution lost, as it counts at its output."""
        if arrival.shortcut is None or not isinstance(module, CONVOLUTIONS):
            return None
        exact, rough = arrival.shortcut
        if exact.shape != rough.shape or arrival.exact is None or exact.shape != arrival.exact.shape:
            return None
        found = self.walk.stations.sums[name].norm
        return exact - rough if found is None else (exact - rough) / _gain(self.walk.exact.get_submodule(found), exact)

    def _correct(self, station: Station, arrivals: Sequence[Arrival]) -> Any:
        """A norm's statistics or a layer's bias; of a bias, what moves the outputs at hand likewise."""
        module: Any = self.walk.rough.get_submodule(station.name)
        pairs = [
            (arrival.exact, arrival.rough)
            for arrival in arrivals
            if isinstance(arrival.exact, Tensor) and isinstance(arrival.rough, Tensor)
            and arrival.exact.shape == arrival.rough.shape
        ]  # fmt: skip
        if not pairs:
            return None
        shift = Shift()
        for exact, rough in pairs:
            axis = 1 if station.step == Step.NORM else channel_axis_of_output(module, exact)
            f, q = by_channel(exact, axis), by_channel(rough, axis)
            usual = usual_vectors(f) if station.step == Step.BIAS else slice(None)
            shift.add(f[usual], q[usual])
        if not shift.count:
            return None
        shift.correct(station.name, module, SHRINKAGE)
        names = ("running_mean", "running_var") if station.step == Step.NORM else ("bias",)
        self._keep(station, {name: getattr(module, name) for name in names}, None)
        if station.step == Step.NORM:
            return None
        mean = (shift.sums["q"] - shift.sums["f"]) / shift.count

        def moved(output: Tensor) -> Tensor:
            axis = channel_axis_of_output(module, output)
            return output - mean.to(output).view([-1 if position == axis else 1 for position in range(output.dim())])

        return moved

    def _leave_as_it_was(self, buffers: Mapping[str, Tensor]) -> None:
        """Float weights of what the plan rounds to nearest; counters, for runs are not part of the result; no new bias
        where nothing was corrected."""
        corrected = {f"{name}.{kind}" for name in self.walk.norms for kind in ("running_mean", "running_var")}
        for name, buffer in self.walk.rough.named_buffers():
            if name in buffers and name not in corrected:
                buffer.copy_(buffers[name])
        for name in self.walk.biased:
            if Station(name, Step.BIAS) not in self.walk.done and self.walk.exact.get_submodule(name).bias is None:
                self.walk.rough.get_submodule(name).register_parameter("bias", None)
        for name, weight in self.floats.items():
            self.walk.rough.get_submodule(name).weight.copy_(weight)  # type: ignore[operator]

    def notes(self) -> list[str]:
        """What a user is warned of."""
        # That embeddings are rounded to nearest is what is expected, and where that is better it is no loss.
        listed = [
            f"{name!r} ({why})" for name, why in self.nearest.items() if why not in (EMBEDDING, SHARED, NO_BETTER)
        ]
        few = f"few inputs to compensate on: {first_few(self.few, ', ')}; give more batches"
        return [*([f"rounded to nearest: {first_few(listed)}"] if listed else []), *([few] if self.few else [])]


def _stations(model: nn.Module, names: Sequence[str], batch: Any) -> Stations:
    """The stations as one sample's run shows them; of a model that takes a whole batch alone, as that does."""
    try:
        return find_stations(model, names, one_sample(batch, 0))
    except SettingError:
        return find_stations(model, names, batch)


def _may_be_biased(module: Any, anew: bool) -> bool:
    """Whether a layer's bias may take its mean error. anew: also where it has none yet."""
    return _has_weights(module) and (anew or module.bias is not None)


def _has_weights(module: Any) -> bool:
    return bool(module.weight.numel())


def _gain(norm: Any, like: Tensor) -> Tensor:
    """What a BatchNorm multiplies its input with, each channel at least by LEAST_GAIN in size."""
    gain = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight
    least = torch.where(gain < 0, -LEAST_GAIN, LEAST_GAIN)
    return torch.where(gain.abs() < LEAST_GAIN, least, gain).view(1, -1, *[1] * (like.dim() - 2))


def _unit(station: Station) -> str:
    return f"{station.step.name.lower()} {station.name}"
