"""Correcting what quantization shifts: BatchNorm's statistics, and the biases of layers without a BatchNorm.

Quantized weights shift and stretch every channel's output, and the statistics that BatchNorm stored no longer fit.
With mean and variance mu, v of each BatchNorm's input over the calibration batches, in the float net (f) and in the
quantized one (q), each BatchNorm normalising by its batch,

    running_mean += mu_q - mu_f        running_var *= (v_q / v_f) / rho^shrinkage

rho being the correlation of the two nets' values. shrinkage 0 restores the variance; but part of v_q
is noise, which that takes for signal. The least squared error is at 2, where the scale is the regression of the float
values on the quantized ones; 1 lies between, and was best on the real nets from 2 to 4 bits. Where no BatchNorm
follows, the layer's bias takes the mean output error of each channel (Nagel et al. 2019, arXiv 1906.04721, sec. 4.2),
over outputs of usual length.

What comes back is a float model with the weights as they were (or clipped to fitted ranges, where asked), so that
`apply` and every adapter find their own way with it: per channel, folding the corrected statistics into the weights
changes scales and biases, and no code.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..common.checks import shown
from ..common.progress import Progress, check_callbacks
from ..common.text import first_few
from ..errors import SettingError
from ..measurement.moments import second_moments, weight_users
from ..models.arguments import check_module
from ..models.folding import folded_copy
from ..models.input_ranges import input_ranges, put_input_ranges, without_input_ranges
from ..models.kinds import quantizable_weights
from ..models.plain import is_plain
from ..models.running import checked_batches, evaluating, first_input, run_model
from ..models.tracing import BATCH_NORMS, Traced
from ..plans.arguments import check_plan
from ..plans.plan import Plan
from ..quantization.fitted import check_fits, fitted
from ..weights.dtypes import check_weight
from .calibrate import plans_ranges
from .match import match
from .model import simulate_model
from .parts import weight_parts
from .shifts import (
    Shift,
    by_channel,
    channel_axis_of_output,
    correctable,
    correction_targets,
    own_biases,
    usual_vectors,
)

LOG = logging.getLogger(__name__)


def correct(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    *,
    shrinkage: float = 1.0,
    fit_ranges: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Make a float copy of the model whose BatchNorm statistics and biases suit the plan's quantized weights.

    A plan measured with BatchNorm folded in gives a folded copy, where only biases are left to correct. Layers that
    have no bias get one. Where the plan quantizes inputs, their shifts are corrected too (`calibrate_inputs` says in
    which ranges); the copy has ranges where the model has. It warns of layers that no batch reached.

    Args:
        model: The float model; it is not changed.
        plan: The plan.
        batches: Calibration inputs without labels: tensors, or tuples or mappings of a forward's arguments. A few
            hundred samples do, in batches of 64 or more where there is BatchNorm.
        shrinkage: 0 to 2: how much of the noise that quantization adds is taken out of the variance. 0 restores the
            variance, 2 has the least squared error, and 1 was best on real nets from 2 to 4 bits.
        fit_ranges: Whether to first clip each channel's weights to the range of least squared error weighted by the
            second moments of the layer's inputs, for plans whose ranges are the extremes (affine per_channel minmax).
        progress: Called with what is being done, how much of it is done and how much there is.

    Returns:
        The copy; quantize it by the same plan.

    Raises:
        SettingError: There are no batches, the model does not run on the inputs, or a statistic is not finite. The
            message names the layer.
        MismatchError: The plan is for another model.
        WeightError: A weight cannot be quantized.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=2)(mpq.measure(net))
        >>> corrected = mpq.correct(net, plan, [torch.randn(64, 8)])
        >>> quantized = mpq.apply(corrected, plan)
    """
    check_module(model)
    check_plan(plan)
    check_callbacks(progress=progress)
    if isinstance(shrinkage, bool) or not isinstance(shrinkage, int | float) or not 0 <= shrinkage <= 2:
        raise SettingError(f"shrinkage: {shown(shrinkage)} is not allowed; a number from 0 to 2")
    traced = Traced(model)
    plan = match(plan, model, rewrapped=True, traced=traced).require(type(model).__name__)
    given = checked_batches(batches)
    copied = folded_copy(traced, plan)
    ranges = plans_ranges(copied, plan, given)
    exact = without_input_ranges(copied) if fit_ranges or input_ranges(copied) else copied
    if fit_ranges:
        _fit_ranges(copied, plan, given)
    quantized = simulate_model(copied, plan)
    if not input_ranges(quantized):
        put_input_ranges(quantized, ranges)
    own_biases(copied)
    shifts, unreached = _measure(exact, quantized, plan, given, progress)
    LOG.info("%d statistics and biases corrected on %d batches", len(shifts), len(given))
    with torch.no_grad():
        for name, shift in shifts.items():
            LOG.debug("%s", name)
            shift.correct(name, copied.get_submodule(name), shrinkage)
    if unreached:
        named = first_few([repr(name) for name in unreached], ", ")
        warnings.warn(f"no calibration batch reached {named}: not corrected", stacklevel=2)
    return copied


def _fit_ranges(model: nn.Module, plan: Plan, batches: Sequence[Any]) -> None:
    """Clip the model's own planned weights, each channel for its bits."""
    planned = {name: choice for name, choice in plan.by_any_name.items() if not choice.in_float}
    weights = {name: w for name, w in quantizable_weights(model).items() if name in planned}
    choices = {name: planned[name] for name in weights}
    for name, weight in weights.items():
        check_weight(weight, name)
    schemes = {name: check_fits(choice.scheme, name) for name, choice in choices.items()}
    with evaluating(model):
        moments = second_moments(model, {name: weight_users(model, w) for name, w in weights.items()}, batches)
    with torch.no_grad():
        for name, weight in weights.items():
            axis = choices[name].channel_axis
            for part in weight_parts(weight, choices[name]):
                if not part.in_float:
                    h = moments[name].index_select(axis, part.channels)
                    part.put(weight, fitted(part.values, part.bits, schemes[name], h, axis))


def _measure(
    exact: nn.Module, rough: nn.Module, plan: Plan, batches: Sequence[Any], progress: Progress | None
) -> tuple[dict[str, Shift], list[str]]:
    """What each module that takes a correction needs, and the modules that no batch reached.

    Layers that feed a BatchNorm leave the correction to it.
    """
    names = correctable(exact, correction_targets(exact, plan), batches)
    shifts: dict[str, Shift] = {}
    feeders: set[str] = set()
    for position, batch in enumerate(batches):
        if progress is not None:
            progress("correcting", position, len(batches))
        kept = _Values()
        with kept.recording(exact, names):
            run_model(exact, batch)
        feeders |= kept.feeders
        others = [name for name in names if name not in feeders]
        with kept.comparing(rough, others, shifts):
            run_model(rough, batch)
    if progress is not None:
        progress("", len(batches), len(batches))
    return shifts, [name for name in names if name not in shifts and name not in feeders]


class _Values:
    """One batch's values in the float net, by module and call, for the quantized net to be compared with."""

    def __init__(self) -> None:
        self.by_name: dict[str, list[Tensor]] = {}
        self.feeders: set[str] = set()
        self._outputs: dict[int, tuple[str, Tensor]] = {}

    @contextmanager
    def recording(self, net: nn.Module, names: Sequence[str]) -> Iterator[None]:
        """While the float net runs."""

        def norm(name: str, _: nn.Module, value: Tensor) -> None:
            source = self._outputs.get(id(value))
            if source is not None and source[1].equal(value):  # nothing in between worked in place
                self.feeders.add(source[0])
            self.by_name.setdefault(name, []).append(value.clone())

        def layer(name: str, _: nn.Module, output: Tensor) -> None:
            kept = output.clone()  # what comes next may change it in place
            self._outputs[id(output)] = (name, kept)
            self.by_name.setdefault(name, []).append(kept)

        with _hooked(net, names, norm, layer):
            yield
        self._outputs.clear()

    @contextmanager
    def comparing(self, net: nn.Module, names: Sequence[str], shifts: dict[str, Shift]) -> Iterator[None]:
        """While the quantized net runs: every module goes on as if it were corrected already."""

        def pair(name: str, value: Tensor, axis: int) -> tuple[Tensor, Tensor]:
            calls = self.by_name.get(name, [])
            if not calls or calls[0].shape != value.shape:
                raise _another_path(name)
            return by_channel(calls.pop(0), axis), by_channel(value, axis)

        def norm(name: str, _: nn.Module, value: Tensor) -> None:
            shifts.setdefault(name, Shift()).add(*pair(name, value, 1))

        def layer(name: str, module: nn.Module, output: Tensor) -> Tensor:
            axis = channel_axis_of_output(module, output)
            f, q = pair(name, output, axis)
            usual = usual_vectors(f)
            f, q = f[usual], q[usual]
            shifts.setdefault(name, Shift()).add(f, q)
            shape = [1] * output.dim()
            shape[axis] = -1
            return output - (q.mean(0) - f.mean(0)).to(output).view(shape)

        with _hooked(net, names, norm, layer):
            yield
        for name in names:
            if self.by_name.get(name):
                raise _another_path(name)


def _another_path(name: str) -> SettingError:
    return SettingError(f"{name!r}: the model takes another path through it, or past it, with quantized weights")


@dataclass(frozen=True)
class _Hooks:
    """What is done as modules run; see _hooked."""

    norm: Callable[[str, nn.Module, Tensor], None]
    layer: Callable[[str, nn.Module, Tensor], Tensor | None]

    def put(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        """Hang them on a module."""
        if not isinstance(module, BATCH_NORMS):
            return [module.register_forward_hook(lambda module, _, output: self._after_layer(name, module, output))]
        plain = is_plain(module)
        return [
            module.register_forward_pre_hook(partial(self._before_norm, name, plain), with_kwargs=True),
            module.register_forward_hook(partial(self._after_norm, plain), with_kwargs=True),
        ]

    def _before_norm(self, name: str, plain: bool, module: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        self.norm(name, module, first_input(args, kwargs))
        if not plain:  # its forward does more, so it is its own that runs, in training without learning
            module.training, module.momentum, module.kept_momentum = True, 0.0, module.momentum

    def _after_norm(self, plain: bool, module: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> Any:
        if plain:
            return _by_batch(module, first_input(args, kwargs))
        module.training, module.momentum = False, module.kept_momentum
        del module.kept_momentum
        if module.num_batches_tracked is not None:
            module.num_batches_tracked -= 1
        return output

    def _after_layer(self, name: str, module: nn.Module, output: Any) -> Any:
        if not isinstance(output, Tensor):
            raise SettingError(f"layer {name!r}: gives a {type(output).__name__}, not a tensor; skip it")
        return self.layer(name, module, output)


@contextmanager
def _hooked(
    net: nn.Module,
    names: Sequence[str],
    norm: Callable[[str, nn.Module, Tensor], None],
    layer: Callable[[str, nn.Module, Tensor], Tensor | None],
) -> Iterator[None]:
    """Show each BatchNorm's input to `norm`, and let it normalise by its batch; show each layer's output to `layer`."""
    hooks, modules = _Hooks(norm, layer), dict(net.named_modules())
    with ExitStack() as stack:  # which is how hooks are taken off again
        for name in names:
            for handle in hooks.put(name, modules[name]):
                stack.enter_context(handle)
        yield


def _by_batch(norm: Any, value: Tensor) -> Tensor:
    """What the BatchNorm gives when it normalises by its batch."""
    return F.batch_norm(value, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
