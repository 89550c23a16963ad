"""Filling a table with a sensitivity: what quantizing each layer, at each bit-width, is predicted to cost.

A sensitivity needs the model and a few hundred unlabeled inputs; weight errors (`mse`, `relative`) need neither and are
in every table. Each kind is a frozen dataclass that an entry point of the group `mpq_plugins.sensitivities` names.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..common import registry
from ..common.journal import Journal
from ..common.progress import Progress
from ..common.text import first_few
from ..errors import MismatchError, SettingError
from ..models.fingerprint import batches_digest, model_digest, source_digest
from ..models.folding import folded_copy
from ..models.kinds import quantizable_weights
from ..models.running import call_model, checked_batches, evaluating, own_copy, seeded
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from ..quantization.fitted import check_fits, fitted
from ..quantization.quantize import fake_quantize
from ..weights.find import find_weights
from .error import weights_fingerprint
from .moments import second_moments, weight_users

Array = NDArray[np.float64]
Output = Callable[[nn.Module, Any], Tensor]
"""A user's output function: (model, batch) -> (samples, features), such as embeddings."""


@dataclass(frozen=True)
class Curves:
    """A layer's predicted cost at each bit-width of the table, (bits,), and that of its channels, (bits, channels)."""

    layer: Array
    channels: Array | None = None


@dataclass(frozen=True)
class Job:
    """What a sensitivity works on: a copy of the model in evaluation mode, in which it may change weights.

    weights: by layer name; modules: all that use a layer's weight; output: the user's function, or the model's own
    output; moments: second moments of the layers' inputs, where ranges are fitted to them, which `ranges` keeps;
    journal: rows of an interrupted run, for sensitivities that take long; generator: the job's own, on the CPU, for
    whatever is drawn at random.
    """

    model: nn.Module
    table: LayerTable
    batches: Sequence[Any]
    weights: Mapping[str, Tensor]
    modules: Mapping[str, Sequence[nn.Module]]
    output: Output | None
    moments: Mapping[str, Tensor] | None
    journal: Journal | None
    progress: Progress | None
    generator: torch.Generator
    ranges: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def quantized(self, layer: LayerStats) -> Iterator[Tensor]:
        """The layer's weight at each bit-width of the table, in its own shape."""
        scheme, axis = self.table.scheme, layer.channel_axis
        for b in self.table.bits:
            weight = self.weights[layer.name]
            if self.moments is not None:
                weight = self._fitted(layer, b, weight)
            yield fake_quantize(weight, b, scheme, channel_axis=axis, layer=layer.name)

    def _fitted(self, layer: LayerStats, bits: int, weight: Tensor) -> Tensor:
        """The weight clipped to its fitted ranges, which are searched once: every batch asks for them again."""
        assert self.moments is not None
        axis, key = layer.channel_axis, (layer.name, bits)
        if key not in self.ranges:
            scheme = check_fits(self.table.scheme, layer.name)
            clipped = fitted(weight, bits, scheme, self.moments[layer.name], axis)
            others = [other for other in range(clipped.dim()) if other != axis]
            if bits == 1 or not clipped.numel():
                return clipped
            self.ranges[key] = clipped.amin(others, keepdim=True), clipped.amax(others, keepdim=True)
        low, high = self.ranges[key]
        return torch.minimum(torch.maximum(weight, low), high)

    def squared_errors(self, layer: LayerStats, weight: Tensor) -> Array:
        """sum_j weight_cj (w - w')_cj^2 at each bit-width, (bits, channels); `weight` has the layer's shape."""
        own = self.weights[layer.name]
        errors = [(w - own).double().square() * weight.double() for w in self.quantized(layer)]
        axis = layer.channel_axis
        summed = [error.movedim(axis, 0).flatten(1).sum(1) for error in errors]
        return torch.stack(summed).cpu().numpy()

    def run(self, batch: Any) -> Tensor:
        """The output for a batch: the user's function's, or the model's own logits. Raises SettingError."""
        found = call_model(self.model, batch) if self.output is None else self._custom(batch)
        logits = getattr(found, "logits", found)
        if not isinstance(logits, Tensor) or logits.dim() < 2:
            raise SettingError(
                f"output: {type(self.model).__name__} gives a {type(logits).__name__}, and a tensor (samples, features)"
                " is needed; pass output=, a function of the model and a batch that returns one"
            )
        return logits

    def logits(self, batch: Any) -> Tensor:
        """As `run`, for what takes the last dimension for classes. Raises SettingError."""
        found = self.run(batch)
        if found.dim() > 3:
            raise SettingError(
                f"output: has the shape {list(found.shape)}, where the last dimension should be the classes; pass "
                "output=, as in lambda model, batch: model(batch).movedim(1, -1)"
            )
        return found

    def _custom(self, batch: Any) -> Tensor:
        assert self.output is not None
        try:
            return self.output(self.model, own_copy(batch))
        except SettingError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise SettingError(f"output: the function failed ({type(error).__name__}: {error})") from error

    def said(self, done: int, total: int) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress("", done, total)


def unreached(layer: str) -> SettingError:
    """The error for a layer whose sensitivity the inputs cannot tell."""
    return SettingError(
        f"layer {layer!r}: no batch reaches it, or the output does not depend on it; give inputs that do, or skip it"
    )


class Sensitivity(Protocol):
    """A frozen dataclass named by an entry point."""

    name: ClassVar[str]

    def measure(self, job: Job) -> Mapping[str, Curves]:
        """Curves by layer name, for every layer of the job's table."""
        ...


def sensitivity(
    model: nn.Module,
    table: LayerTable,
    kind: "str | Sensitivity",
    batches: Iterable[Any],
    *,
    output: Output | None = None,
    seed: int = 0,
    fit_ranges: bool = False,
    journal: str | Path | None = None,
    progress: Progress | None = None,
) -> LayerTable:
    """The table with one more sensitivity: what quantizing each layer is predicted to cost, at all of its bit-widths.

    kind: `output_mse`, the squared error of the layer's output (one pass); `kl`, the divergence of the model's
    predictions, and `distance`, 1 - cosine of its output, with that layer alone quantized; `fisher` and `hessian`,
    quadratics around the float weights; another that an entry point names; or a value of such a class, as
    Hessian(probes=16). batches: a few hundred inputs without labels, as for `correct`. output: (model, batch) -> tensor
    (samples, features), for models whose own output is no logits. seed: of labels and probes; the same seed gives the
    same table. fit_ranges: quantize by the ranges of least input-weighted squared error, as the same argument of
    `correct` puts them into the model (for tables measured under affine per_channel minmax). journal: a file where
    finished layers are kept (kl and distance), so that an interrupted measurement goes on; it is removed at the end.
    The model is not changed.

    Raises SettingError (inputs, outputs, layers that no input reaches), MismatchError (another model's table) and
    PluginError (a kind that is not installed).
    """
    measurer: Sensitivity = registry.load("sensitivities", kind)() if isinstance(kind, str) else kind
    if isinstance(measurer, type) or not hasattr(measurer, "measure"):
        raise SettingError(f"kind: {kind!r:.60} is no sensitivity; a name, or a value such as Hessian(probes=8)")
    given = checked_batches(batches)
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise SettingError(f"seed: {seed!r} is not allowed; an integer from 0 up")
    copied = folded_copy(model, table)
    weights = _weights(copied, table)
    kept = None
    if journal is not None:
        identity = _identity(copied, table, measurer, given, output, seed) | {"fit_ranges": str(fit_ranges)}
        kept = Journal(Path(journal), identity)
    modules = {layer.name: weight_users(copied, weights[layer.name]) for layer in table.layers}
    for layer in table.layers if fit_ranges else ():
        check_fits(table.scheme, layer.name)
    with evaluating(copied), seeded(seed) as generator:
        moments = second_moments(copied, modules, given) if fit_ranges else None
        found = measurer.measure(
            Job(copied, table, given, weights, modules, output, moments, kept, progress, generator)
        )
    layers = tuple(_with_curves(layer, measurer.name, found[layer.name]) for layer in table.layers)
    if kept is not None:
        kept.path.unlink(missing_ok=True)
    return replace(table, layers=layers)


def _with_curves(layer: LayerStats, name: str, curves: Curves) -> LayerStats:
    bad = [curve for curve in (curves.layer, curves.channels) if curve is not None and not np.isfinite(curve).all()]
    if bad:
        raise SettingError(f"layer {layer.name!r}: its {name} is NaN or infinite; look at the inputs and the model")
    channels = {key: value for key, value in layer.channel_sensitivities.items() if key != name}
    if curves.channels is not None:
        channels[name] = curves.channels
    return replace(layer, sensitivities={**layer.sensitivities, name: curves.layer}, channel_sensitivities=channels)


def _weights(model: nn.Module, table: LayerTable) -> dict[str, Tensor]:
    found = quantizable_weights(model)
    missing = [layer.name for layer in table.layers if layer.name not in found]
    other = [
        layer.name for layer in table.layers if layer.name in found and tuple(found[layer.name].shape) != layer.shape
    ]
    if missing or other:
        named = first_few([repr(name) for name in (missing or other)], ", ")
        what = "lacks" if missing else "has other shapes of"
        raise MismatchError(f"{type(model).__name__}: {what} {named}; the table was measured on another model")
    planned = {layer.name for layer in table.layers}
    handles = [weight for weight in find_weights(model, refuse=False) if weight.name in planned]
    if weights_fingerprint(handles) != table.fingerprint:
        raise MismatchError(f"{type(model).__name__}: has other weights than those the table was measured on")
    return {layer.name: found[layer.name].detach() for layer in table.layers}


def _identity(
    model: nn.Module, table: LayerTable, kind: Sensitivity, batches: Sequence[Any], output: Output | None, seed: int
) -> dict[str, str]:
    plan = hashlib.sha256(f"{table.fingerprint} {table.scheme} {table.bits}".encode()).hexdigest()
    return {
        "sensitivity": repr(kind), "model": model_digest(model), "table": plan, "batches": batches_digest(batches),
        "output": source_digest(output) if output is not None else "", "seed": str(seed),
    }  # fmt: skip
