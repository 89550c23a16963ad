"""A weight as integer codes on one grid for each group, under any scheme that has such a form."""

from torch import Tensor

from ..plans.scheme import Scheme
from .affine import QuantizedTensor, quantize
from .quantize import quantizer


def integer_codes(weight: Tensor, bits: int, scheme: Scheme, *, channel_axis: int, layer: str) -> QuantizedTensor:
    """The codes and their grid: what the scheme's quantizer says of itself, or what its affine equal gives.

    The scheme's `as_affine` is not None. Raises as quantizing does, naming the layer.
    """
    own = getattr(quantizer(scheme), "integers", None)
    if own is not None:
        made: QuantizedTensor = own(weight, bits, channel_axis=channel_axis, layer=layer)
        return made
    return quantize(weight, bits, scheme.as_affine, channel_axis=channel_axis, layer=layer)
