"""Block reconstruction (BRECQ, Li et al. 2021, arXiv 2102.05426, algorithm 1), unit by unit.

The float net and the quantized net stand side by side. A unit, a block or a layer in none, sees the inputs that the
quantized net so far gives it, and learns its rounding so that its output comes close to the float net's.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..common.checks import shown
from ..common.progress import Progress, check_callbacks
from ..common.store import Store, opened
from ..errors import SettingError
from ..models.arguments import check_module
from ..models.device import checked_device
from ..models.input_ranges import NAME, refuse_input_ranges
from ..models.running import checked_batches, evaluating, sample_count
from ..plans.activations import Activations
from ..plans.arguments import check_plan
from ..plans.names import weight_name
from ..plans.plan import Plan
from ..quantization.input_values import InputValues
from ..simulation.match import match
from .activations import ActivationRange
from .adaround import Rounding, settled
from .cache import Cache
from .capture import calls_of, first_tensor, inputs_of
from .collect import Collector
from .finished import FinishedBlocks, job_of
from .fisher import importance_of
from .learn import Block, Learned, inner_name, learn
from .nets import Nets, as_the_models, device_of, on_device
from .rounding import refuse_stochastic
from .samples import Samples
from .settings import MEMORY, BlockReport, Settings, usual_lr

LOG = logging.getLogger(__name__)


@torch.inference_mode(mode=False)
@torch.enable_grad()
def reconstruct(  # noqa: PLR0913  # each option is a user's word
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    *,
    blocks: str | Sequence[str] = (),
    steps: int = 20_000,
    batch_size: int = 32,
    lr: float | None = None,
    loss: Literal["mse", "fisher"] = "mse",
    regulariser: float = 0.01,
    mix: float = 0.5,
    correct: bool = False,
    tune: Literal["rounding", "norms"] = "rounding",
    seed: int = 0,
    device: str | torch.device | None = None,
    memory: int = MEMORY,
    store: str | Path | Store | None = None,
    progress: Progress | None = None,
    finished: Callable[[BlockReport], None] | None = None,
) -> nn.Module:
    """Learn how weights are rounded, block by block, in a float copy whose weights lie on the plan's grids.

    BRECQ (arXiv 2102.05426, sec. 3) with AdaRound's parametrization (arXiv 2004.10568, eq. 21 to 24), under any affine
    plan, parts included. One block after another, and each layer in no block by itself, learns whether its weights
    round up or down, so that on the inputs that the quantized model so far gives it its output is the float model's.
    Quantizing the copy by the plan changes nothing: `apply` and every adapter find the learned codes in it.

    Where the plan quantizes activations, each layer's input gets a range that is learned along and stays in the result
    (`input_ranges`). A block that learning makes no better than rounding to nearest keeps that. Embeddings are rounded
    to nearest, and so are weights shared with one.

    Args:
        model: The float model; it is not changed.
        plan: The plan.
        batches: Inputs without labels, as for `correct`; 1,024 samples are usual.
        blocks: Globs, or `re:` and a regular expression, on module names, of which the outermost that match are the
            blocks. By default they are the innermost modules in a list (Sequential, ModuleList) that hold several
            layers, such as residual blocks and transformer layers.
        steps: For each block, each on `batch_size` samples.
        batch_size: Samples of a step.
        lr: Adam's, by default 6 / steps within 0.001 and 0.02, for a weight must be able to cross from one level to the
            next.
        loss: `mse`, or `fisher`, where each output counts by its squared gradient of the model's own predictions
            (logits are needed).
        regulariser: Weight of the term that decides each weight.
        mix: Probability that an input value is the float model's instead (QDrop, arXiv 2203.05740, sec. 4); 0 is
            BRECQ's own.
        correct: Whether to begin at `correct`'s model.
        tune: `norms` learns the block's biases, norms and other float parameters along with the `rounding`.
        seed: The same gives the same model, whatever was interrupted.
        device: Where blocks are learned, by default where the model is.
        memory: Bytes of cached inputs and outputs; more go to disk.
        store: Where finished blocks are kept, so that the same call goes on there: a file's path, which is there until
            the model is returned, or an open `Store`, which is there until its block ends.
        progress: Called with (block, steps done, steps in all).
        finished: Called with each block's BlockReport.

    Returns:
        The copy.

    Raises:
        SettingError: An argument is not allowed, the plan rounds stochastically, the model is in training mode or does
            not run on the inputs, no batch reaches a block or its inputs cannot be captured, a loss is NaN, or the
            store is another job's. The message names the block.
        MismatchError: The plan is for another model.
        WeightError: A weight cannot be quantized.
        SourceError: The disk is full, say. Finished blocks stay in the store.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(net))
        >>> learned = mpq.reconstruct(net, plan, [torch.randn(32, 8)], steps=10)
        >>> torch.equal(mpq.apply(learned, plan)[0].weight, learned[0].weight)
        True
    """
    named = tuple(blocks) if isinstance(blocks, list | tuple) else (blocks,)
    settings = Settings(
        blocks=named, steps=steps, batch_size=batch_size, lr=usual_lr(steps) if lr is None else lr,
        loss=loss, regulariser=regulariser, mix=mix, correct=correct, tune=tune, seed=seed,
    )  # fmt: skip
    given = _checked(model, plan, batches, memory)
    check_callbacks(progress=progress, finished=finished)
    home = device_of(model)
    place = checked_device(device, dtype=torch.float32) or home
    with opened(store) as kept:
        blocks_kept = None
        if kept is not None:
            blocks_kept = FinishedBlocks(kept.job("reconstruct", job_of(model, plan, given, settings, place)))
        nets = Nets.of(model, plan, given, settings, place)
        _reconstruct(_Job(nets, given, settings, memory, blocks_kept), progress, finished)
    as_the_models(model, nets.rough)
    return nets.rough.to(home)


def _reconstruct(job: "_Job", progress: Progress | None, finished: Callable[[BlockReport], None] | None) -> None:
    """Every unit of the nets, in their order."""
    nets, steps = job.nets, job.settings.steps
    total = steps * len(nets.units)
    with evaluating(nets.exact), evaluating(nets.rough):
        for position, name in enumerate(nets.units):
            report = job.reconstruct(position, name, _words(progress, name, position * steps, total))
            LOG.info("%s: loss %.4g, to nearest %.4g", name, report.learned, report.nearest)
            if finished is not None:
                finished(report)
    nets.restore_buffers()
    if progress is not None:
        progress("", total, total)


@dataclass(frozen=True)
class _Job:
    nets: Nets
    batches: list[Any]
    settings: Settings
    memory: int
    finished: FinishedBlocks | None

    def reconstruct(self, position: int, name: str, said: Callable[[int], None]) -> BlockReport:
        """One unit, learned or read back."""
        self.nets.quantize_inputs(name)
        stored = self.finished.read(position, name) if self.finished is not None else None
        if stored is not None:
            tensors, report = stored
            self.nets.put(tensors)
            return report
        said(0)
        self.nets.restore_buffers()
        start = time.perf_counter()
        # Of its own, so that a run that was interrupted before this unit goes on alike.
        generator = torch.Generator().manual_seed((self.settings.seed * 1_000_003 + position) % (1 << 63))
        with self._cache() as cache:
            samples = self._collect(name, cache, generator)
            block = self._block(name, samples)
            learned = learn(block, samples, self.settings, generator, said)
            del samples
        tensors = self._tensors(name, learned)
        self.nets.put(tensors)
        weights = sum(rounding.step.numel() for rounding in block.roundings.values())
        report = BlockReport(
            name, self.nets.units[name], learned.nearest, learned.learned, learned.changed, weights,
            time.perf_counter() - start,
        )  # fmt: skip
        if self.finished is not None:
            self.finished.write(position, tensors, report)
        return report

    def _cache(self) -> Cache:
        """What does not stay in memory goes beside the store, which there is room for, or to the system's place."""
        if self.finished is None:
            return Cache(self.memory)
        return Cache(self.memory, self.finished.folder, self.finished.cache_name)

    def _collect(self, name: str, cache: Cache, generator: torch.Generator) -> Samples:
        """The unit's inputs and targets on every batch. Raises SettingError where the nets call it differently."""
        exact, rough = (net.get_submodule(name) for net in (self.nets.exact, self.nets.rough))

        def alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            with torch.no_grad():
                return first_tensor(exact(*args, **kwargs), name)

        collector = Collector(cache, name, alone, self.settings.mix > 0, self.nets.device)
        for batch, counts in zip(self.batches, self.nets.calls, strict=True):
            if name not in counts:
                continue
            placed = on_device(batch, self.nets.device)
            calls = calls_of(self.nets.exact, exact, name, placed, counts[name])
            inputs = inputs_of(self.nets.rough, rough, placed, counts[name])
            if len(inputs) != len(calls):
                raise SettingError(
                    f"block {name!r}: the quantized model calls it {len(inputs)} times on a batch and the float one "
                    f"{len(calls)} times, for the model decides by values; name larger blocks (blocks=)"
                )
            weights: list[Any] = [None] * len(calls)
            if self.settings.loss == "fisher":
                weights = importance_of(self.nets.exact, exact, name, placed, generator)
            for pair in zip(inputs, calls, weights, strict=True):
                collector.add(*pair)
        return collector.samples()

    def _block(self, name: str, samples: Samples) -> Block:
        module = self.nets.rough.get_submodule(name)
        layers, device = self.nets.units[name], self.nets.device
        choices = self.nets.plan.by_any_name
        roundings = {
            inner_name(weight_name(layer), name): Rounding.of(self.nets.weights[layer], choices[layer]).to(device)
            for layer in layers
        }
        norms = self.nets.vectors_of(name) if self.settings.tune == "norms" else {}
        block = Block(name, module, layers, roundings, norms)
        static = {
            layer: activations
            for layer in layers
            if (activations := choices[layer].activations) is not None and activations.dynamic is None
        }
        return _with_ranges(block, samples, static) if static else block

    def _tensors(self, name: str, learned: Learned) -> dict[str, Tensor]:
        """By their full names; weights as quantizing leaves them."""
        choices = self.nets.plan.by_any_name
        planned = {weight_name(layer): choices[layer] for layer in self.nets.units[name]}
        full = {f"{name}.{key}" if name else key: tensor for key, tensor in learned.tensors.items()}
        return {key: settled(tensor.cpu(), planned[key]) if key in planned else tensor for key, tensor in full.items()}


def _with_ranges(block: Block, samples: Samples, static: Mapping[str, Activations]) -> Block:
    """The block with a range for each input whose range stays, as the inputs suggest with weights rounded to nearest.

    static: how inputs of such ranges are quantized, by layer.
    """
    layers = {inner_name(layer, block.name): InputValues(layer) for layer in static}
    with ExitStack() as watched, torch.no_grad():
        for own, values in layers.items():
            watched.callback(values.watch(block.module.get_submodule(own)).remove)
        for sample in samples.in_order():
            block.run(block.fixed(rounded=False), sample)
    ranges = {}
    for inner, values in layers.items():
        quantizer = getattr(block.module.get_submodule(inner), NAME)
        values.fit(quantizer, static[values.layer])
        ranges[f"{inner}.{NAME}" if inner else NAME] = ActivationRange.of(quantizer)
    return Block(block.name, block.module, block.layers, block.roundings, block.norms, ranges)


def _words(progress: Progress | None, name: str, done: int, total: int) -> Callable[[int], None]:
    return lambda step: progress(name, done + step, total) if progress is not None else None


def _checked(model: nn.Module, plan: Plan, batches: Iterable[Any], memory: int) -> list[Any]:
    check_module(model)
    check_plan(plan)
    match(plan, model).require(type(model).__name__)
    refuse_stochastic(plan, "learned rounding")
    refuse_input_ranges(model)
    if type(memory) is not int or memory < 0:
        raise SettingError(f"memory: {shown(memory)} is not allowed; bytes, an integer from 0 up")
    training = next((name or type(model).__name__ for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise SettingError(
            f"model: {training!r} is in training mode, and would be reconstructed with dropout and batch statistics; "
            "call model.eval() first"
        )
    given = checked_batches(batches)
    empty = next((position for position, batch in enumerate(given) if not sample_count(batch)), None)
    if empty is not None:
        raise SettingError(f"batches: batch {empty} holds no samples; leave it out")
    return given
