"""A sensitivity of another distribution: found by its entry point, measured, and named where it is broken."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.plugins.sensitivity import mpq_energy as outside_sensitivity
from mpq_plugins import Affine, Budget, LayerTable, Sensitivity, measure, sensitivity
from mpq_plugins.errors import PluginError
from tests.conftest import Ran
from tests.helpers.distributions import install
from tests.helpers.nets import conv_net

Mpq = Callable[..., Ran]
WORKING = inspect.getsource(outside_sensitivity)
BITS = (2, 4, 8)
BROKEN = {
    "no-measure": ("class Best:\n    name = 'best'", "lacks measure"),
    "no-name": ("class Best:\n    def measure(self, job): ...", "lacks name"),
    "fails-on-import": ("raise ValueError('no licence')", "ValueError: no licence"),
    "fails": ("class Best:\n    name = 'best'\n    def measure(self, job): raise ValueError('why')", "ValueError: why"),
    "cannot-be-made": (
        "class Best:\n    name = 'best'\n    measure = None\n    def __init__(self): raise ValueError('why')",
        "ValueError: why",
    ),
    "gives-nothing": ("class Best:\n    name = 'best'\n    def measure(self, job): return {}", "no curve"),
    "gives-none": ("class Best:\n    name = 'best'\n    def measure(self, job): ...", "no curve"),
}


def batches() -> list[Tensor]:
    return [torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path for distributions of others."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture(scope="module")
def table() -> LayerTable:
    return measure(conv_net(), Affine(granularity="per_channel"), BITS, per_channel=True)


def test_it_uses_public_names_alone() -> None:
    imported = [line for line in WORKING.splitlines() if "import" in line and "mpq_plugins" in line]
    assert imported == ["from mpq_plugins import Curves, Job"]
    known: Sensitivity = outside_sensitivity.Energy()
    assert known.name == "energy"


def test_it_is_measured_as_ours_are(site: Path, table: LayerTable) -> None:
    install(site, "working-sensitivity", WORKING, {"sensitivities": {"energy": "Energy"}})
    net = conv_net()
    by_name = sensitivity(net, table, "energy", batches())
    assert by_name.sensitivities == ("energy",)
    twice = sensitivity(net, table, outside_sensitivity.Energy(scale=2.0), batches())
    with torch.no_grad():
        power = sum(float(net(batch).square().mean()) for batch in batches()) / 2
    for layer, doubled in zip(by_name.layers, twice.layers, strict=True):
        curve = layer.sensitivities["energy"]
        assert doubled.sensitivities["energy"] == pytest.approx(2 * curve)
        assert curve == pytest.approx(layer.errors["mse"] * layer.numel * power, rel=1e-4)
    assert Budget(average_bits=4.0, bits=BITS, sensitivity="energy*mse")(by_name).size().average_bits <= 4


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_is_named_and_others_go_on(site: Path, table: LayerTable, name: str) -> None:
    code, said = BROKEN[name]
    install(site, f"sensitivity-{name}", code, {"sensitivities": {"best": "Best"}})
    with pytest.raises(PluginError) as error:
        sensitivity(conv_net(), table, "best", batches())
    assert f"sensitivities: 'best' of sensitivity-{name}" in str(error.value)
    assert said in str(error.value)
    assert sensitivity(conv_net(), table, "output_mse", batches()).sensitivities == ("output_mse",)
