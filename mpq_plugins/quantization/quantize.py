"""The quantizer of a scheme, whichever the scheme, and what it makes of a weight."""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

from ..common.registry import Plugin, imported, owner
from ..plans.affine import Affine
from ..plans.scheme import Scheme
from ..plans.schemes import SCHEMES
from .contract import QUANTIZER, Each, Quantizer
from .grid import AnyGrids, Grids, GroupStats
from .scales import check_scales
from .stochastic import StochasticGrids


def quantizer(scheme: Scheme) -> Quantizer:
    """The scheme's quantizer. Raises PluginError where its module cannot be imported or it lacks a method."""
    made: Quantizer = _quantizer_class(scheme.name, scheme.quantizer)(scheme)
    return made


def fake_quantize(
    weight: Tensor, bits: int, scheme: Scheme | None = None, *, channel_axis: int = 0, layer: str = "weight"
) -> Tensor:
    """Quantize and dequantize `weight`: what `bits` can hold, in its own dtype and shape.

    weight: float32, float16 or bfloat16, any shape, any strides; `channel_axis` is its output axis. scheme: None for
    Affine(). Raises SettingError for bits that the scheme does not have or groups that do not divide the input, and
    WeightError, naming `layer`, for NaN, infinity or another dtype.
    """
    return quantizer(scheme or Affine()).fake_quantize(weight, bits, channel_axis=channel_axis, layer=layer)


def choose_grids(each: Each, stats: GroupStats, bits: Sequence[int], scheme: Scheme, layer: str = "weight") -> AnyGrids:
    """The grids of each group at these bit-widths under the scheme's rule, (R, len(bits)).

    Raises SettingError for a bit-width that the scheme does not have, and, naming `layer`, for a scale beyond its
    dtype.
    """
    grids = quantizer(scheme).grids(each, stats, bits)
    levels = grids.grids if isinstance(grids, StochasticGrids) else grids
    if isinstance(levels, Grids) and isinstance(scheme, Affine):
        check_scales(levels.scale, scheme.scale_dtype, layer)
    return grids


@cache
def _quantizer_class(name: str, target: str) -> Any:
    if name in SCHEMES:  # this package's, whoever else declares the name
        module, _, kind = target.partition(":")
        return getattr(import_module(module), kind)
    declared = owner("schemes", name) or Plugin("schemes", name, target, "no distribution")
    return imported(declared, target, QUANTIZER)
