"""Our microscaled and 8-bit floating-point weights are torchao's, to the bit."""

import pytest
import torch

from mpq_plugins import Minifloat
from mpq_plugins.plans.minifloat import MINIFLOATS, MinifloatName
from mpq_plugins.quantization.quantize import fake_quantize

mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
constants = pytest.importorskip("torchao.prototype.mx_formats.constants")

ELEMENTS = {
    "mxfp4": torch.float4_e2m1fn_x2, "mxfp6_e2m3": constants.DTYPE_FP6_E2M3, "mxfp6_e3m2": constants.DTYPE_FP6_E3M2,
    "mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2,
}  # fmt: skip


@pytest.mark.parametrize("kind", MINIFLOATS)
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_weights_are_torchaos(kind: MinifloatName, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator) * torch.exp(spread * torch.randn(64, 1, generator=generator))
    scheme = Minifloat(format=kind)
    if scheme.microscaled:  # of a row of zeros torchao's FP8 makes NaN
        weight[3] = 0
    found = fake_quantize(weight, scheme.bits, scheme, channel_axis=0, layer="fc")
    if scheme.microscaled:
        scale, data = mx.to_mx(weight, ELEMENTS[kind], 32)
        expected = mx.to_dtype(data, scale, ELEMENTS[kind], 32, torch.float32)
    else:
        from torchao.quantization import Float8Tensor, PerRow

        dtype = torch.float8_e4m3fn if kind == "fp8_e4m3" else torch.float8_e5m2
        expected = Float8Tensor.from_hp(weight, float8_dtype=dtype, granularity=PerRow()).dequantize()
    assert found.equal(expected)
