"""How `correct` does it: the float and the quantized net side by side, module by module."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .apply import apply
from .batches import checked_batches, evaluating, run_model
from .correct import Progress
from .errors import SettingError, first_few
from .fold import BATCH_NORMS, fold_batch_norm
from .match import match
from .measure.moments import second_moments, weight_users
from .plan import Plan
from .quantize.fitted import check_fits, fitted
from .scheme import FLOAT_BITS
from .weights import layer_kind, quantizable_weights

LONGEST = 3.0  # times the median length of an output vector; longer ones are left out of a bias's mean
LEAST_RHO = 0.3  # below it a channel is mostly noise, and its correlation an estimate of little
BIASED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def corrected(
    model: nn.Module, plan: Plan, batches: Iterable[Any], shrinkage: float, fit_ranges: bool, progress: Progress | None
) -> nn.Module:
    """What `correct` promises."""
    if isinstance(shrinkage, bool) or not isinstance(shrinkage, int | float) or not 0 <= shrinkage <= 2:
        raise SettingError(f"shrinkage: {shrinkage!r} is not allowed; a number from 0 to 2")
    match(plan, model).require(type(model).__name__)
    given = checked_batches(batches)
    copied = fold_batch_norm(model) if plan.fold_bn else copy.deepcopy(model)
    exact = copy.deepcopy(copied) if fit_ranges else copied
    if fit_ranges:
        _fit_ranges(copied, plan, given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about activations, which stay in float here
        quantized = apply(copied, plan)
    shifts, unreached = _measure(exact, quantized, plan, given, progress)
    with torch.no_grad():
        for name, shift in shifts.items():
            shift.correct(name, copied.get_submodule(name), shrinkage)
    if unreached:
        named = first_few([repr(name) for name in unreached], ", ")
        warnings.warn(f"no calibration batch reached {named}: not copied", stacklevel=2)
    return copied


def _fit_ranges(model: nn.Module, plan: Plan, batches: Sequence[Any]) -> None:
    """Clip the model's own planned weights, each channel for its bits."""
    weights = {name: w for name, w in quantizable_weights(model).items() if name in plan.by_any_name}
    choices = {name: plan.by_any_name[name] for name in weights}
    schemes = {name: check_fits(choice.scheme, name) for name, choice in choices.items()}
    with evaluating(model):
        moments = second_moments(model, {name: weight_users(model, w) for name, w in weights.items()}, batches)
    with torch.no_grad():
        for name, weight in weights.items():
            axis = choices[name].channel_axis
            for part in choices[name].groups:
                if part.bits in FLOAT_BITS:
                    continue
                index = torch.tensor(part.channels, device=weight.device)
                own, h = weight.index_select(axis, index), moments[name].index_select(axis, index)
                weight.index_copy_(axis, index, fitted(own, part.bits, schemes[name], h, axis))


@dataclass
class _Shift:
    """Sums over the calibration set of one module's values, per channel, in float64; f the float net's, q the other."""

    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, exact: Tensor, rough: Tensor) -> None:
        """Take in one call's values, (values, channels)."""
        f, q = exact.double(), rough.double()
        self.count += len(f)
        new = {"f": f.sum(0), "q": q.sum(0), "ff": (f * f).sum(0), "qq": (q * q).sum(0), "fq": (f * q).sum(0)}
        self.sums = {key: self.sums[key] + value if self.sums else value for key, value in new.items()}

    def correct(self, name: str, module: nn.Module, shrinkage: float) -> None:
        """Put it right in the float net's module."""
        mean = {key: self.sums[key] / self.count for key in self.sums}
        if not all(bool(value.isfinite().all()) for value in mean.values()):
            raise SettingError(
                f"{name!r}: its values on the calibration batches are NaN or infinite; look at the inputs"
            )
        shift = mean["q"] - mean["f"]
        if isinstance(module, BATCH_NORMS):
            self._correct_norm(module, mean, shift, shrinkage)
            return
        assert isinstance(module, BIASED)
        if module.bias is None:
            zeros = module.weight.new_zeros(shift.numel())
            module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)
        module.bias -= shift.to(module.bias)

    @staticmethod
    def _correct_norm(module: Any, mean: dict[str, Tensor], shift: Tensor, shrinkage: float) -> None:
        v_f, v_q = (mean[2 * key] - mean[key] ** 2 for key in "fq")
        covariance = mean["fq"] - mean["f"] * mean["q"]
        # A channel that does not vary, in either net, has no scale to put right.
        alive = (v_f > 1e-12 * mean["ff"]) & (v_q > 1e-12 * mean["qq"])
        rho = (covariance / (v_f * v_q).clamp_min(1e-300).sqrt()).clamp(LEAST_RHO, 1.0)
        ratio = torch.where(alive, v_q / v_f.clamp_min(1e-300) / rho**shrinkage, 1.0)
        module.running_mean += shift.to(module.running_mean)
        module.running_var *= ratio.to(module.running_var)


def _targets(model: nn.Module, plan: Plan) -> list[str]:
    """Every BatchNorm with statistics, and every planned layer that can have a bias."""
    planned = plan.by_any_name
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, BATCH_NORMS) and module.running_mean is not None)
        or (name in planned and isinstance(module, BIASED) and layer_kind(module) is not None)
    ]


def _measure(
    exact: nn.Module, rough: nn.Module, plan: Plan, batches: Sequence[Any], progress: Progress | None
) -> tuple[dict[str, _Shift], list[str]]:
    """What each module that takes a correction needs, and the modules that no batch reached.

    Layers that feed a BatchNorm leave the correction to it.
    """
    names = _targets(exact, plan)
    shifts: dict[str, _Shift] = {}
    feeders: set[str] = set()
    for position, batch in enumerate(batches):
        if progress is not None:
            progress("correcting", position, len(batches))
        kept = _Values()
        with kept.recording(exact, names):
            run_model(exact, batch)
        feeders |= kept.feeders
        own = [name for name in names if name not in feeders]
        with kept.comparing(rough, own, shifts):
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

        def hook(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if isinstance(module, BATCH_NORMS):
                source = self._outputs.get(id(inputs[0]))
                if source is not None:
                    self.feeders.add(source[0])
                self.by_name.setdefault(name, []).append(inputs[0])
                return _by_batch(module, inputs[0])
            self._outputs[id(output)] = (name, output)  # kept, so that no other tensor gets the same id
            self.by_name.setdefault(name, []).append(output)
            return None

        with _hooked(net, names, hook):
            yield
        self._outputs.clear()

    @contextmanager
    def comparing(self, net: nn.Module, names: Sequence[str], shifts: dict[str, _Shift]) -> Iterator[None]:
        """While the quantized net runs: every module goes on as if it were corrected already."""

        def hook(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            norm = isinstance(module, BATCH_NORMS)
            value = inputs[0] if norm else output
            calls = self.by_name.get(name, [])
            if not calls or calls[0].shape != value.shape:
                raise SettingError(f"{name!r}: the model takes another path through it with quantized weights")
            exact, axis = calls.pop(0), 1 if norm else _channel_axis(module, value)
            f, q = (_by_channel(tensor, axis) for tensor in (exact, value))
            if not norm:
                usual = _usual(f)
                f, q = f[usual], q[usual]
            shifts.setdefault(name, _Shift()).add(f, q)
            if norm:
                return _by_batch(module, value)
            shape = [1] * value.dim()
            shape[axis] = -1
            return value - (q.mean(0) - f.mean(0)).to(value).view(shape)

        with _hooked(net, names, hook):
            yield


@contextmanager
def _hooked(net: nn.Module, names: Sequence[str], hook: Callable[..., Any]) -> Iterator[None]:
    modules = dict(net.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda module, i, o, name=name: hook(name, module, i, o)) for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_batch(norm: Any, value: Tensor) -> Tensor:
    """What the BatchNorm gives when it normalises by its batch."""
    return F.batch_norm(value, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)


def _channel_axis(module: nn.Module, output: Tensor) -> int:
    """Linear layers have their channels last; a convolution's come before its positions, batch or no batch."""
    if isinstance(module, nn.Linear):
        return output.dim() - 1
    positions = 1 + sum(isinstance(module, kinds) for kinds in (_ABOVE_1D, _ABOVE_2D))
    return output.dim() - 1 - positions


_ABOVE_1D = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ABOVE_2D = (nn.Conv3d, nn.ConvTranspose3d)


def _usual(vectors: Tensor) -> Tensor:
    """Which output vectors (values, channels) are no outliers in length.

    In transformers a few tokens, such as the first, carry activations hundreds of times those of the others (Sun et al.
    2024, arXiv 2402.17762), and the normalisation after them takes the length away: a mean error that they decide is
    right for them and wrong for all others. Spearman of MiniLM at uniform 2 bits: 0.771 with them, 0.838 without.
    """
    lengths = vectors.float().norm(dim=1)
    usual: Tensor = lengths <= LONGEST * lengths.median()
    return usual


def _by_channel(value: Tensor, axis: int) -> Tensor:
    """(values, channels)."""
    return value.movedim(axis, -1).reshape(-1, value.shape[axis])
