import numpy as np
import pytest
import torch

from mpq_plugins import Affine
from mpq_plugins.quantization.grid import Grids, affine_grids
from mpq_plugins.quantization.quantize import fake_quantize


def squared_error(weight: torch.Tensor, bits: int, scheme: Affine) -> torch.Tensor:
    return (fake_quantize(weight, bits, scheme) - weight).double().square().sum(dim=1)


def samples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(6, 400, generator=generator)
    outliers = gaussian.clone()
    outliers[:, 0] = 40.0
    return {"gaussian": gaussian, "laplacian": gaussian.sign() * gaussian.square(), "outliers": outliers,
            "positive": gaussian.abs(), "constant": torch.full((2, 5), 0.3)}  # fmt: skip


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_clipping_is_never_worse_than_min_max(name: str, symmetric: bool, bits: int) -> None:
    weight = samples()[name]
    clipped = squared_error(weight, bits, Affine(symmetric=symmetric, granularity="per_channel", range="mse"))
    widest = squared_error(weight, bits, Affine(symmetric=symmetric, granularity="per_channel"))
    assert (clipped <= widest * (1 + 1e-5) + 1e-12).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gaussian", "laplacian", "outliers", "positive"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric_clipping_is_close_to_brute_force(name: str, bits: int) -> None:
    weight = samples()[name][:2].double()
    found = squared_error(weight.float(), bits, Affine(symmetric=True, granularity="per_channel", range="mse"))
    for row, got in zip(weight, found, strict=True):
        best = float("inf")
        for ratio in torch.linspace(0.01, 1, 2000).tolist():
            top = (row.abs().max() * ratio).reshape(1).numpy()
            grid = affine_grids(-top[:, None], top[:, None], np.array([bits]), Affine(symmetric=True))
            scale = float(grid.scale[0, 0])
            quantized = torch.clamp(torch.round(row / scale), int(grid.qmin[0]), int(grid.qmax[0])) * scale
            best = min(best, float((quantized - row).square().sum()))
        assert got <= best * 1.02


def test_one_group_over_several_blocks_is_the_group_whole() -> None:
    from mpq_plugins.quantization.kernel import row_stats
    from mpq_plugins.quantization.quantize import choose_grids

    weight = samples()["laplacian"]
    scheme = Affine(range="mse")
    whole = choose_grids(lambda work: work(weight), row_stats(weight).merged(), [3], scheme)
    halves = [weight[:2], weight[2:]]
    split = choose_grids(
        lambda work: np.concatenate([work(half) for half in halves]), row_stats(weight).merged(), [3], scheme
    )
    assert isinstance(whole, Grids)
    assert isinstance(split, Grids)
    assert whole.scale.tolist() == split.scale.tolist()
    assert whole.zero_point.tolist() == split.zero_point.tolist()


def test_clipping_pays_where_there_are_outliers() -> None:
    weight = samples()["outliers"]
    clipped = squared_error(weight, 4, Affine(granularity="per_channel", range="mse"))
    widest = squared_error(weight, 4, Affine(granularity="per_channel"))
    assert (clipped <= widest).all()
    assert clipped.sum() < widest.sum()
