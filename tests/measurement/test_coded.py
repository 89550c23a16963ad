"""Entropies in a table: of every layer, whoever measures, and from a store."""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Affine, EntropyCoded, LayerTable, Store, measure
from mpq_plugins.quantization.ladder import climbed
from mpq_plugins.weights.chunks import Array, Op
from tests.helpers.tables import contents


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Embedding(12, 4))


@pytest.fixture(scope="module")
def table() -> LayerTable:
    return measure(net(), EntropyCoded())


def _asked(rows: Tensor, op: Op) -> Array:
    return op(rows)


def test_every_layer_has_the_curve_of_its_weight(table: LayerTable) -> None:
    for layer in table.layers:
        rows = net().get_parameter(f"{layer.name}.weight").detach().flatten(1)
        steps, bits, squared = climbed(partial(_asked, rows), EntropyCoded())
        assert layer.coded is not None
        for found, wanted in zip((layer.coded.steps, layer.coded.bits, layer.coded.squared_error),
                                 (steps, bits, squared), strict=True):  # fmt: skip
            assert np.array_equal(found, wanted)


def test_entropy_falls_and_error_grows_with_the_step(table: LayerTable) -> None:
    for layer in table.layers:
        assert layer.coded is not None
        assert layer.coded.bits[0] > layer.coded.bits[24] > layer.coded.bits[48]
        assert layer.coded.squared_error[0] < layer.coded.squared_error[24] < layer.coded.squared_error[48]
        assert layer.coded.bits[-1] == 0
        weight = net().get_parameter(f"{layer.name}.weight").detach()
        assert layer.coded.squared_error[-1] == pytest.approx(float(weight.double().square().sum()))


@pytest.mark.parametrize("scheme", [Affine(), EntropyCoded(step=0.1)], ids=str)
def test_other_schemes_have_none(scheme: "Affine | EntropyCoded") -> None:
    assert all(layer.coded is None for layer in measure(net(), scheme, (8,)).layers)


def test_it_is_the_same_whoever_measures(table: LayerTable, tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "net.pt")
    names = {layer.name: layer.coded for layer in table.layers}
    with ProcessPoolExecutor(1) as executor:
        apart = measure(tmp_path / "net.pt", EntropyCoded(), executor=executor)
    assert [contents(layer.coded) for layer in apart.layers] == [contents(names[layer.name]) for layer in apart.layers]


def test_a_stopped_measurement_goes_on(table: LayerTable, tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop(_: str, done: int, total: int) -> None:
        assert done <= total
        if 2 * done > total:  # the ladder has begun
            raise StoppedError

    with pytest.raises(StoppedError):
        measure(net(), EntropyCoded(), store=tmp_path / "kept", progress=stop)
    with Store(tmp_path / "kept") as store:
        assert contents(measure(net(), EntropyCoded(), store=store)) == contents(table)
