"""Every type measured as `measure` measures its scheme, of the layers that can have it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mpq_plugins import MeasureWarning, SettingError, TypeTable, measure, measure_types, named_type, sensitivity
from mpq_plugins.common.store import Store
from tests.helpers.tables import contents

TYPES = ("mxfp4", "mxfp8_e4m3", "nvfp4", "fp8_e5m2")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8), nn.Linear(8, 8)).eval()


def test_a_column_is_what_measuring_its_scheme_gives() -> None:
    table = measure_types(net(), TYPES, ("mse",))
    for column in table.columns:
        alone = measure(net(), column.type.scheme, (column.type.bits,), ("mse",), only=list(column.by_name))
        assert contents(alone.layers) == contents(column.table.layers)
    assert [layer.name for layer in table.base.layers] == ["0", "2", "3"]
    assert table.types_for("3") == ("fp8_e5m2",)


def test_a_type_that_no_layer_can_have_is_no_column() -> None:
    with pytest.warns(MeasureWarning, match="no layer's inputs divide into the groups of mxfp4, mxfp8_e4m3, nvfp4, so"):
        table = measure_types(nn.Linear(8, 8), TYPES)
    assert [kind.name for kind in table.types] == ["fp8_e5m2"]


def test_a_layer_that_can_have_no_type_is_named_with_the_remedy() -> None:
    with pytest.raises(
        SettingError, match=r"types: layer '3' has the shape \[8, 8\], whose inputs .* groups of any of"
    ):
        measure_types(net(), ("mxfp4",))
    assert [layer.name for layer in measure_types(net(), ("mxfp4",), skip=["3"]).base.layers] == ["0", "2"]


def test_files_skips_and_progress_are_as_in_measure(tmp_path: Path) -> None:
    save_file(dict(net().state_dict()), tmp_path / "net.safetensors")
    seen: list[tuple[int, int]] = []
    table = measure_types(
        tmp_path / "net.safetensors", TYPES, skip=["0"], progress=lambda _, done, total: seen.append((done, total))
    )
    assert [layer.name for layer in table.base.layers] == ["2", "3"]
    assert table.base.skipped == ("0",)
    assert seen[-1][0] == seen[-1][1]
    done = [number / total for number, total in seen]
    assert done == sorted(done)


def test_an_interrupted_measurement_goes_on(tmp_path: Path) -> None:
    def stop(name: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    store = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        measure_types(net(), TYPES, store=store, progress=stop)
    with Store(store) as kept:
        assert len(kept)
    assert contents(measure_types(net(), TYPES, store=store)) == contents(measure_types(net(), TYPES))


def test_a_sensitivity_is_measured_as_every_type(tmp_path: Path) -> None:
    model, batches = net(), [torch.randn(16, 64, generator=torch.Generator().manual_seed(0))]
    table = sensitivity(model, measure_types(model, TYPES), "output_mse", batches)
    for column in table.columns:
        kind = named_type(column.type.name)
        alone = measure(model, kind.scheme, (kind.bits,), only=list(column.by_name))
        expected = sensitivity(model, alone, "output_mse", batches)
        for layer in expected.layers:
            found = column.by_name[layer.name].sensitivities["output_mse"]
            assert np.array_equal(found, layer.sensitivities["output_mse"])
    table.save(tmp_path / "t.mpqt")
    assert contents(TypeTable.load(tmp_path / "t.mpqt")) == contents(table)


def test_layers_that_no_type_holds_are_refused_before_the_work(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(7, 8))
    with pytest.raises(SettingError, match="layer '0' has the shape"):
        measure_types(net, ("int4_g32",), store=tmp_path / "t.store")
    assert not list(tmp_path.iterdir())
