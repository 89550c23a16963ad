"""What quantization does to a module's values, channel by channel, and how a BatchNorm or a bias makes it good.

The formulas, and why they are so, are in correct.py; compensated rounding applies them layer by layer.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..common.text import first_few
from ..errors import SettingError
from ..measurement.own_output import watching
from ..models.behaviour import adds_its_bias, follows_its_statistics
from ..models.folding import borrowed_weights
from ..models.kinds import layer_kind
from ..models.plain import is_plain
from ..models.running import run_model
from ..models.tracing import BATCH_NORMS, CONVOLUTIONS
from ..plans.plan import Plan

LONGEST = 3.0  # times the median length of an output vector; longer ones are left out of a bias's mean
AT_ONCE = 8192  # rows that are summed: their float64 copies stay in the cache; those of all take thrice as long
LEAST_RHO = 0.3  # below it a channel is mostly noise, and its correlation an estimate of little
BIASED = (nn.Linear, *CONVOLUTIONS)


def own_biases(model: nn.Module) -> None:
    """Layers that share a bias get one each, for each has an error of its own."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, BIASED) and module.bias is not None:
            if id(module.bias) in seen:
                module.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=module.bias.requires_grad)
            seen.add(id(module.bias))


def with_bias(module: Any) -> Any:
    """The layer, linear or a convolution, with a bias of zeros where it has none."""
    if module.bias is None:
        outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        zeros = module.weight.new_zeros(outputs)
        module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)
    return module


@dataclass
class Shift:
    """Sums over the calibration set of one module's values, per channel, in float64; f the float net's, q the other."""

    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, exact: Tensor, rough: Tensor) -> None:
        """Take in one call's values, (values, channels)."""
        for some, others in zip(exact.split(AT_ONCE), rough.split(AT_ONCE), strict=True):
            f, q = some.double(), others.double()
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
        biased = with_bias(module)
        biased.bias -= shift.to(biased.bias)

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


def correction_targets(model: nn.Module, plan: Plan) -> list[str]:
    """Every BatchNorm with statistics, and every planned layer that can have a bias."""
    planned = plan.by_any_name
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, BATCH_NORMS) and module.running_mean is not None)
        or (name in planned and isinstance(module, BIASED) and layer_kind(module) is not None)
    ]


def correctable(model: nn.Module, names: Sequence[str], batches: Sequence[Any]) -> list[str]:
    """Those whose bias or statistics do what they do in torch's classes; the others are named in a warning.

    A bias or statistics that a functional call uses too are left as they are.
    """
    modules = dict(model.named_modules())
    odd = {modules[name]: name for name in names if not is_plain(modules[name])}
    follows: dict[str, bool] = {}

    def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name = odd[module]
        if isinstance(module, BATCH_NORMS):
            follows[name] = follows.get(name, True) and follows_its_statistics(module, args, kwargs)
        elif isinstance(output, Tensor):
            axis = channel_axis_of_output(module, output)
            follows[name] = follows.get(name, True) and adds_its_bias(module, axis, args, kwargs)

    with watching(list(odd), seen):
        for batch in batches[: 1 if odd else 0]:
            run_model(model, batch)
    corrected = {f"{name}.{attribute}": name for name in names for attribute in ("bias", "running_mean", "running_var")}
    lent = {corrected[parameter] for parameter in borrowed_weights(model) if parameter in corrected}
    left = [name for name in names if name in lent or not follows.get(name, modules[name] not in odd)]
    if left:
        named = first_few([repr(name) for name in left], ", ")
        warnings.warn(f"not corrected, for they compute in their own way or lend what would be: {named}", stacklevel=4)
    return [name for name in names if name not in left]


def channel_axis_of_output(module: nn.Module, output: Tensor) -> int:
    """Linear layers have their channels last; a convolution's come before its positions, batch or no batch."""
    if isinstance(module, nn.Linear):
        return output.dim() - 1
    positions = 1 + sum(isinstance(module, kinds) for kinds in (_ABOVE_1D, _ABOVE_2D))
    return output.dim() - 1 - positions


_ABOVE_1D = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ABOVE_2D = (nn.Conv3d, nn.ConvTranspose3d)


def usual_vectors(vectors: Tensor) -> Tensor:
    """Which output vectors (values, channels) are no outliers in length.

    In transformers a few tokens, such as the first, carry activations hundreds of times those of the others (Sun et al.
    2024, arXiv 2402.17762), and the normalisation after them takes the length away: a mean error that they decide is
    right for them and wrong for all others. Spearman of MiniLM at uniform 2 bits: 0.771 with them, 0.838 without.
    """
    lengths, longest = _lengths(vectors)
    # NaN and infinity stay in, to be found in the mean.
    usual: Tensor = ~(lengths.isfinite() & (lengths > longest))
    return usual


def shortening(vectors: Tensor) -> Tensor:
    """What each of these output vectors (values, channels) is multiplied with to be no outlier in length, (values,).

    Where nothing normalises the length away, as behind the first token of a causal language model, the others depend on
    it. Squared, it would decide everything; left out, it would be rounded as if nothing did.
    """
    lengths, longest = _lengths(vectors)
    return torch.where(lengths.isfinite() & (lengths > longest), longest / lengths, torch.ones_like(lengths))


def _lengths(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The length of each vector, and that beyond which one is an outlier."""
    lengths = vectors.float().norm(dim=1)
    return lengths, LONGEST * lengths[lengths > 0].median()


def by_channel(value: Tensor, axis: int) -> Tensor:
    """(values, channels)."""
    return value.movedim(axis, -1).reshape(-1, value.shape[axis])
