"""Our microscaled and 8-bit floating-point weights are torchao's, to the bit."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Minifloat, measure_types
from mpq_plugins.plans.minifloat import MINIFLOATS, MinifloatName
from mpq_plugins.quantization.contract import PartShape
from mpq_plugins.quantization.quantize import fake_quantize, quantizer
from mpq_plugins.weights import chunks

nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
constants = pytest.importorskip("torchao.prototype.mx_formats.constants")

ELEMENTS = {
    "mxfp4": torch.float4_e2m1fn_x2, "mxfp6_e2m3": constants.DTYPE_FP6_E2M3, "mxfp6_e3m2": constants.DTYPE_FP6_E3M2,
    "mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2,
}  # fmt: skip
NVFP4 = Minifloat(format="nvfp4")


@pytest.mark.parametrize("kind", [kind for kind in MINIFLOATS if kind != "nvfp4"])
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


def odd_weights() -> dict[str, Tensor]:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    weight = draw(64, 96)
    with_zeros, outlier = weight.clone(), weight.clone()
    with_zeros[3], with_zeros[5, 3:40] = 0, 0
    outlier[7, 11] = 3e4  # so that other blocks have the least scale there is
    return {
        "plain": weight, "spread": weight * torch.exp(3 * draw(64, 1)), "zeros": with_zeros, "outlier": outlier,
        "negative": -weight.abs(), "tiny": weight * 1e-25, "vast": weight * 1e35, "constant": torch.full((4, 32), -0.3),
        "ties": torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4).reshape(2, 16) * 448,
    }  # fmt: skip


def torchaos(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, block scales, the layer's scale, weights."""
    scale = nv.per_tensor_amax_to_scale(weight.abs().max())
    made = nv.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale)
    block_scales, packed = nv.nvfp4_quantize(weight, per_tensor_scale=scale)
    assert block_scales.float().equal(made.scale.float())
    return nv.unpack_uint4(packed.view(torch.uint8)), block_scales.float(), scale, made.dequantize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", odd_weights())
def test_nvfp4_has_torchaos_codes_scales_and_weights(kind: str, dtype: torch.dtype) -> None:
    weight = odd_weights()[kind].to(dtype)
    if not weight.isfinite().all() or not weight.any():
        pytest.skip("float16 does not hold it")
    part = PartShape(tuple(weight.shape), 0, 4, NVFP4, "fc")
    found = quantizer(NVFP4).encode(weight, part)
    # torchao takes no float16, and computes in float32 whatever it is given.
    codes, block_scales, scale, expected = torchaos(weight.float() if dtype == torch.float16 else weight)
    assert found.symbols.tolist() == torch.where(codes == 8, 0, codes).flatten().tolist()  # which has a -0
    assert found.tables.tolist() == [*block_scales.flatten().tolist(), scale.item()]
    for made in (
        fake_quantize(weight, 4, NVFP4, channel_axis=0, layer="fc"), quantizer(NVFP4).decode(found, part, dtype),
    ):  # fmt: skip
        assert made.dtype == dtype
        assert made.equal(expected.to(dtype))


@pytest.mark.parametrize("weight", [torch.zeros(3, 32), torch.full((3, 32), 1e-42), torch.full((2, 16), 3.4e38)])
def test_nvfp4_stays_finite_where_torchao_does_not(weight: Tensor) -> None:
    found = fake_quantize(weight, 4, NVFP4, channel_axis=0, layer="fc")
    assert found.isfinite().all()
    assert float((found - weight).abs().max()) <= max(float(weight.abs().max()) * 1e-6, 2.0**-126)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_of_many_chunks_are_those_of_torchaos_weights(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 200)
    layers = {kind: weight for kind, weight in odd_weights().items() if kind not in ("tiny", "vast", "constant")}
    linears = {kind: nn.Linear(weight.shape[1], weight.shape[0]) for kind, weight in layers.items()}
    net = nn.ModuleDict(linears).to(dtype)
    for kind, linear in linears.items():
        linear.weight.data = layers[kind].to(dtype)
    table = measure_types(net, ("nvfp4",), ("mse", "max_abs"))
    for layer in table.column("nvfp4").table.layers:
        weight = linears[layer.name].weight.detach()
        *_, expected = torchaos(weight.float())
        error = (expected.double() - weight.double()).abs()
        assert layer.errors["mse"][0] == pytest.approx(float(error.square().mean()), rel=1e-12)
        assert layer.errors["max_abs"][0] == float(error.max())
