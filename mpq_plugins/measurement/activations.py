"""Filling a table with what is measured of layers' inputs: their errors at each width, ties, and what they cost."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..common.checks import listed, shown, words
from ..common.progress import Progress, check_callbacks
from ..common.store import Store, opened
from ..common.text import first_few
from ..common.workers import check_executor
from ..errors import SettingError
from ..models.arguments import check_module
from ..models.fingerprint import batches_digest, model_digest, source_digest
from ..models.folding import folded_copy
from ..models.input_ranges import InputRange, refuse_input_ranges
from ..models.running import checked_batches, evaluating, seeded
from ..plans.activations import Activations, check_input_bits
from ..plans.stats import Array, InputStats
from ..plans.table import LayerTable
from .alone import COMPARED, Alone
from .contract import Output, unreached
from .input_calls import InputCalls, live_sets, tensor_names
from .input_change import Inputs, input_curves
from .input_errors import InputErrors
from .moments import weight_users
from .sensitivity import weights_of

LOG = logging.getLogger(__name__)

INPUT_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
INPUT_SENSITIVITIES = ("output_mse", *COMPARED)
SEED = 0  # of what a model's forward draws at random
COARSE = 8  # bits at which an output that depends on an input is seen to move


def measure_activations(  # noqa: PLR0913  # each option is a user's word
    model: nn.Module,
    table: LayerTable,
    batches: Iterable[Any],
    bits: Sequence[int] = INPUT_BITS,
    *,
    activations: Activations = Activations(8),  # noqa: B008  # frozen
    sensitivities: Sequence[str] = ("output_mse",),
    output: Output | None = None,
    executor: Executor | None = None,
    store: str | Path | Store | None = None,
    progress: Progress | None = None,
) -> LayerTable:
    """Measure the quantization of every layer's input, at every width, into the table: errors, ties and costs.

    Two passes over the batches find the ranges and the errors. All layers of the table have an input but embeddings,
    and layers that it skips. `live` of the table has the largest sets of inputs that a forward pass needs at once: at
    the call of a layer, those that have been read and will be again, and its own. Float tensors between layers, as
    those that a residual connection adds up, are not counted.

    Args:
        model: The model; it is not changed.
        table: The table that was measured of it. What it says of inputs is replaced.
        batches: A few hundred inputs without labels, as for `sensitivity`.
        bits: The widths, any of 2..16.
        activations: How inputs are quantized; its own width does not matter.
        sensitivities: What the inputs of a layer alone, quantized, do: `output_mse`, the squared error of the layer's
            own output, in the same passes; `kl`, the divergence of the model's predictions, and `distance`, 1 - cosine
            of its output, in a run from that layer on for each layer, width and batch.
        output: (model, batch) -> tensor (samples, features), for models whose own output is no logits.
        executor: A concurrent.futures.Executor for kl and distance, as in `measure`: threads, processes, or dask's. The
            model travels to it.
        store: Where finished layers are kept (kl and distance), so that an interrupted measurement goes on, as in
            `measure`.
        progress: Called with what is being done, how much of it is done and how much there is.

    Returns:
        The table with `LayerStats.inputs`, `activations`, `input_bits` and `live`.

    Raises:
        SettingError: A width or another argument is not allowed, no batch reaches a layer, or its inputs are all zero
            or not finite. The message names the layer.
        MismatchError: The table is another model's.
        WorkerError: An executor's workers fail.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> table = mpq.measure_activations(net, mpq.measure(net), [torch.randn(4, 8)], (4, 8))
        >>> table.input_bits, table.layers[0].inputs.errors["mse"].shape
        ((4, 8), (2,))
    """
    check_module(model)
    check_callbacks(progress=progress)
    check_executor(executor)
    asked = _Asked(activations, checked_input_bits(bits), _checked_sensitivities(sensitivities), output)
    if not isinstance(table, LayerTable):
        raise SettingError(
            f"table: a {type(table).__name__} has no widths for inputs to go with; a LayerTable, of mpq_plugins.measure"
        )
    refuse_input_ranges(model)
    given = checked_batches(batches)
    copied = folded_copy(model, table)
    weights = weights_of(copied, table)
    modules = {
        layer.name: [user for user in weight_users(copied, weights[layer.name]) if not isinstance(user, nn.Embedding)]
        for layer in table.layers
        if layer.kind != "embedding"
    }
    _check_kinds(table, activations)
    LOG.info("inputs of %d layers on %d batches", len(modules), len(given))
    job = _Job(copied, table, modules, given, asked, executor, progress)
    with opened(store) as kept, evaluating(copied), seeded(SEED):
        return job.measured(kept)


@dataclass(frozen=True)
class _Asked:
    """What is measured."""

    activations: Activations
    bits: tuple[int, ...]
    sensitivities: tuple[str, ...]
    output: Output | None


@dataclass(frozen=True)
class _Job:
    """What is measured, of a copy of the model in evaluation mode. modules: those that use a layer's weight."""

    model: nn.Module
    table: LayerTable
    modules: Mapping[str, Sequence[nn.Module]]
    batches: Sequence[Any]
    asked: _Asked
    executor: Executor | None
    progress: Progress | None

    def measured(self, store: Store | None) -> LayerTable:
        """The table with the inputs."""
        kinds = [kind for kind in self.asked.sensitivities if kind in COMPARED]
        said = _counted(self.progress, len(self.batches) * (2 + len(kinds) * len(self.modules)))
        calls = self._calls(said)
        ranges = self._ranges(calls)
        errors = InputErrors(self.modules, ranges, "output_mse" in self.asked.sensitivities)
        errors.run(self.model, self.batches, said)
        moved = {kind: self._moved(kind, ranges, store, said) for kind in kinds}
        said()
        passes = list(calls.passes)
        tensors = tensor_names(passes)

        def stats(name: str) -> InputStats:
            found = errors.errors(name)
            costs = {
                kind: moved[kind][name] if kind in moved else errors.output_mse(name)
                for kind in self.asked.sensitivities
            }
            for kind in moved:
                if min(self.asked.bits) <= COARSE and found["mse"][0] and not moved[kind][name].any():
                    raise unreached(name)
            return InputStats(calls.numel(name), tensors[name], found, costs)

        layers = tuple(
            replace(layer, inputs=stats(layer.name) if layer.name in self.modules else None)
            for layer in self.table.layers
        )
        return replace(
            self.table, layers=layers, activations=self.asked.activations, input_bits=self.asked.bits,
            live=live_sets(passes, tensors),
        )  # fmt: skip

    def _calls(self, said: Callable[[], None]) -> InputCalls:
        """A pass over the batches. Raises SettingError for layers that none reaches."""
        calls = InputCalls(self.modules)
        for batch in self.batches:
            said()
            calls.run(self.model, batch)
        if calls.unreached:
            named = first_few([repr(name) for name in calls.unreached], ", ")
            raise SettingError(
                f"layer {named}: no batch reaches it, or it is used without being called, so its input is not known; "
                "skip it when the table is measured, or give other batches"
            )
        return calls

    def _ranges(self, calls: InputCalls) -> dict[str, tuple[InputRange, ...]]:
        """By layer, at each width."""
        widths = [replace(self.asked.activations, bits=b) for b in self.asked.bits]
        return {name: tuple(map(values.range, widths)) for name, values in calls.values.items()}

    def _moved(
        self, kind: str, ranges: Mapping[str, tuple[InputRange, ...]], store: Store | None, said: Callable[[], None]
    ) -> dict[str, Array]:
        """The outputs' change of that kind, by layer, at each width."""
        paths = {module: path for path, module in self.model.named_modules()}
        names = {name: tuple(paths[module] for module in users) for name, users in self.modules.items()}
        inputs = Inputs(names, ranges)
        alone = Alone(self.model, kind, self.asked.output, inputs, inputs.widths, self.batches, SEED, "inputs")
        finished = store.job(f"inputs {kind}", self._facts(kind)) if store is not None else None
        return input_curves(alone, finished, self.executor, said)

    def _facts(self, kind: str) -> dict[str, str]:
        """All that decides the result, for a store."""
        table, output = self.table, self.asked.output
        layers = hashlib.sha256(f"{table.fingerprint} {list(self.modules)}".encode()).hexdigest()
        return {
            "sensitivity": kind, "model": model_digest(self.model), "table": layers,
            "batches": batches_digest(self.batches), "output": source_digest(output) if output is not None else "",
            "activations": repr(replace(self.asked.activations, bits=COARSE)), "bits": repr(self.asked.bits),
        }  # fmt: skip


def _counted(progress: Progress | None, total: int) -> Callable[[], None]:
    """What is called before each of so many steps."""
    done = 0

    def said() -> None:
        nonlocal done
        if progress is not None:
            progress("", done, total)
        done += 1

    return said


def checked_input_bits(bits: Sequence[int], name: str = "bits") -> tuple[int, ...]:
    """Distinct widths, ascending. Raises SettingError."""
    widths = listed(name, bits, "a list of one or more of 2 to 16")
    if not widths:
        raise SettingError(f"{name}: {shown(bits)} is not allowed; a list of one or more of 2 to 16")
    for b in widths:
        if b == 1:
            raise SettingError(f"{name}: inputs of 1 bit are not allowed: 0 and one other value; 2 to 16")
        check_input_bits(b, name)
    return tuple(sorted({*widths}))


def _checked_sensitivities(names: Sequence[str]) -> tuple[str, ...]:
    allowed = f"{', '.join(INPUT_SENSITIVITIES)}, or none"
    given = (names,) if isinstance(names, str) else words("sensitivities", names, allowed)
    for name in given:
        if name not in INPUT_SENSITIVITIES:
            raise SettingError(f"sensitivities: {shown(name)} is not known of inputs; {allowed}")
    return tuple(dict.fromkeys(given))


def _check_kinds(table: LayerTable, activations: Activations) -> None:
    """Refuse what plans do. Raises SettingError."""
    if not isinstance(activations, Activations):
        raise SettingError(f"activations: {shown(activations)} is not allowed; a value such as Activations(8)")
    others = [repr(layer.name) for layer in table.layers if layer.kind not in ("linear", "embedding")]
    if activations.dynamic == "per_token" and others:
        raise SettingError(
            f"activations: per_token belongs to linear layers, and {first_few(others, ', ')} are none; per_tensor, or "
            "skip them"
        )
