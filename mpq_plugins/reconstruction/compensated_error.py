"""Compensated MSE: the squared error on a layer's output once its weights are rounded as `compensate` rounds them.

    S_c(b) = P (w_c - q_c) H (w_c - q_c)^T,    H = U^T U / n,   the second moments of the layer's columns U

Q is rounded to b bits with error feedback (feedback.py) towards the layer's own weights, on its inputs in the float
net; P is how many columns a sample has. Columns make good each other's errors, the more so the more they depend on
each other: S is less than output_mse says, and in other proportions between layers. What `compensate` rounds to nearest
is measured as output_mse measures it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..allocation.choices import layer_choice
from ..errors import SettingError
from ..measurement.contract import Curves, Job
from ..measurement.moments import refuse_borrowed
from ..measurement.output_error import OutputMSE
from ..measurement.own_output import watching
from ..models.running import call_model, first_input, sample_count
from ..models.units import Job as Work
from ..models.units import Unit
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from ..simulation.shifts import usual_vectors
from .candidates import why_to_nearest
from .columns import Columns
from .feedback import Factor, compensated, factorise
from .gram import Gram
from .levels import Levels
from .round_layer import MOVING
from .settings import MEMORY, Compensation


@dataclass(frozen=True)
class CompensatedMSE:
    """(w - q)_c H (w - q)_c^T for every output channel, in the squared unit of the layer's output, per sample.

    Attributes:
        columns: As the argument of `compensate`.
        damping: As the argument of `compensate`.
    """

    columns: int = 1 << 16
    damping: float = 0.01
    name: ClassVar[str] = "compensated_mse"

    def __post_init__(self) -> None:
        Compensation(columns=self.columns, damping=self.damping, seed=0)

    def measure(self, job: Job) -> Mapping[str, Curves]:
        """One forward pass a batch, or several where the second moments of all layers do not fit into memory."""
        refuse_borrowed(job.model, job.modules)
        curves: dict[str, Curves] = {}
        passes = list(_passes([layer for layer in job.table.layers if _compensable(job.modules[layer.name])]))
        total = sum(len(job.batches) + len(layers) for layers in passes)
        done = 0
        for layers in passes:
            inputs = _Inputs(job, {layer.name: _Seen() for layer in layers}, self.columns)
            done = inputs.collect(done, total)
            units = [_unit(job, layer, inputs.seen[layer.name], self.damping) for layer in layers]
            for unit, found in Work(layer_curves, {}, f"measuring {self.name} of").results(units, job.executor):
                job.said(done, total)
                done += 1
                curves |= {unit.name: found} if found is not None else {}
        job.said(total, total)
        others = tuple(layer for layer in job.table.layers if layer.name not in curves)
        return {**curves, **(_by_output_mse(job, others) if others else {})}


def _compensable(users: Sequence[nn.Module]) -> bool:
    """Whether `compensate` does more than rounding to nearest, and one H tells the error at all users."""
    alike = {(Columns.of(user).groups, Columns.of(user).transposed) for user in users}
    return len(alike) == 1 and not any(why_to_nearest(user) for user in users)


def _by_output_mse(job: Job, layers: tuple[LayerStats, ...]) -> Mapping[str, Curves]:
    table, modules = replace(job.table, layers=layers), {layer.name: job.modules[layer.name] for layer in layers}
    return OutputMSE().measure(replace(job, table=table, modules=modules, progress=None))


def _passes(layers: Sequence[LayerStats]) -> Iterator[list[LayerStats]]:
    """The layers, as many at a time as second moments fit into memory."""
    now: list[LayerStats] = []
    used = 0
    for layer in layers:
        side = layer.numel // max(1, layer.channels)
        if now and used + 8 * side**2 > MEMORY:
            yield now
            now, used = [], 0
        now.append(layer)
        used += 8 * side**2
    if now:
        yield now


@dataclass
class _Seen:
    """Of one layer: its H, how many columns there were, with those that are not in H, and whether they are tokens."""

    gram: Gram = field(default_factory=Gram)
    positions: int = 0
    tokens: bool = False


@dataclass(frozen=True)
class _Inputs:
    """Layers' inputs in the float net, as they come. columns: as `compensate` takes it."""

    job: Job
    seen: dict[str, _Seen]
    columns: int

    def collect(self, done: int, total: int) -> int:
        """Run all batches; how much is done after."""
        names = {module: name for name in self.seen for module in self.job.modules[name]}
        samples = sum(map(sample_count, self.job.batches))

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            value = first_input(args, kwargs)
            if isinstance(value, Tensor) and isinstance(output, Tensor) and value.numel():
                self._add(self.seen[names[module]], module, value.detach(), output.detach(), samples)

        with watching(list(names), take):
            for position, batch in enumerate(self.job.batches):
                self.job.said(done + position, total)
                with torch.no_grad():
                    call_model(self.job.model, batch)
        return done + len(self.job.batches)

    def _add(self, seen: _Seen, module: Any, value: Tensor, output: Tensor, samples: int) -> None:
        geometry = Columns.of(module)
        seen.positions += geometry.samples(value) * geometry.positions(module, value)
        for piece, at in geometry.drawn(module, value, self.columns, samples, self.job.generator):
            columns = geometry.columns(module, piece.of(value), at)
            if geometry.takes_tokens(value):  # a few are out of proportion
                seen.tokens = True
                columns = columns[usual_vectors(geometry.values(piece.of(output), at).flatten(1))]
            seen.gram.add(columns, None)


def _unit(job: Job, layer: LayerStats, seen: _Seen, damping: float) -> Unit:
    """A layer, which needs nothing of the others once its inputs are summed."""
    bare = replace(job.table, layers=(layer,))
    moments = None if job.moments is None else {layer.name: job.moments[layer.name]}
    samples = sum(map(sample_count, job.batches))
    own = _Layer(bare, job.modules[layer.name][0], job.weights[layer.name], moments, seen, samples)
    return Unit(layer.name, layer.name, (own, damping))


@dataclass(frozen=True)
class _Layer:
    """What a worker needs of a layer. table: of it alone; moments: where ranges are fitted; samples: of all batches."""

    table: LayerTable
    module: nn.Module
    weight: Tensor
    moments: Mapping[str, Tensor] | None
    seen: _Seen
    samples: int


def layer_curves(own: _Layer, damping: float) -> Curves | None:
    """None where the layer is rounded to nearest: no batch reaches it, or there is nothing to compensate with."""
    (layer,), gram, seen, weight = own.table.layers, own.seen.gram, own.seen, own.weight
    if not gram.finite:
        raise SettingError(f"layer {layer.name!r}: its inputs hold NaN or infinity; look at the batches")
    if not gram.count or not bool(gram.h.any()):
        return None
    h = gram.h / gram.count
    factors = [factorise(group, damping) for group in h]
    known = [factor for factor in factors if factor is not None]
    if len(known) < len(factors):
        return None
    geometry = Columns.of(own.module)
    rounding = _Rounding(geometry, h, known, moves=gram.count >= MOVING * h.shape[-1] and not seen.tokens)
    per_sample = seen.positions / own.samples
    job = Job(own.module, own.table, (), {layer.name: weight}, {}, None, own.moments, None, None, torch.Generator())
    rows = []
    for b, clipped, near in zip(own.table.bits, job.clipped(layer), job.quantized(layer), strict=True):
        levels = Levels.of(clipped.cpu(), layer_choice(layer, b, own.table.scheme))
        errors = rounding.errors(weight, levels, near)
        rows.append(errors.movedim(layer.channel_axis, 0).flatten(1).sum(1).cpu().numpy())
    channels = per_sample * np.stack(rows)
    return Curves(channels.sum(1), channels)


@dataclass(frozen=True)
class _Rounding:
    """A layer's rounding, whatever the width. h, factors: of each group; moves: whether single weights are moved."""

    geometry: Columns
    h: Tensor
    factors: Sequence[Factor]
    moves: bool

    def errors(self, weight: Tensor, levels: Levels, near: Tensor) -> Tensor:
        """What each weight adds to the squared error, in the weight's shape, float64.

        near: the weight rounded to nearest, which stays where compensation is no better.
        """
        exact, nearest = self.geometry.matrices(weight), self.geometry.matrices(near)
        group, held = self.geometry.matrices(levels.group), self.geometry.matrices(levels.held)
        found = torch.zeros((2, *exact.shape), dtype=torch.float64, device=exact.device)
        for g, factor in enumerate(self.factors):
            of_group = Levels(levels.values, levels.first, group[g], held[g])
            rounded = compensated(exact[g], self.h[g], factor, of_group, self.moves)
            for k, values in enumerate((nearest[g], rounded)):
                lost = exact[g].double() - values.double()
                found[k, g] = (lost @ self.h[g]) * lost
        better = found[1] if float(found[1].sum()) <= float(found[0].sum()) else found[0]
        return self.geometry.weight(better, weight.shape)
