"""The weight that a scheme can hold at a bit-width, whichever the scheme."""

from torch import Tensor

from ..plans.scheme import Affine, Codebook, Scheme
from . import affine, codebook, piecewise


def fake_quantize(weight: Tensor, bits: int, scheme: Scheme, *, channel_axis: int = 0, layer: str = "weight") -> Tensor:
    """Quantize and dequantize `weight`, in its own dtype and shape; see the scheme's own fake_quantize."""
    if isinstance(scheme, Affine):
        return affine.fake_quantize(weight, bits, scheme, channel_axis=channel_axis, layer=layer)
    if isinstance(scheme, Codebook):
        return codebook.fake_quantize(weight, bits, scheme, channel_axis=channel_axis, layer=layer)
    return piecewise.fake_quantize(weight, bits, scheme, channel_axis=channel_axis, layer=layer)
