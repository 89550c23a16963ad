"""Layers at 16 bits: what a backend leaves in float computes with float16's values, as `apply` does."""

from typing import Any

import pytest
import torch
from torch import nn

from mpq_plugins import Affine, Plan, SettingError, Uniform, VerifyError, apply, legalise, measure
from mpq_plugins.adapters.contract import Adapter
from mpq_plugins.common import registry
from mpq_plugins.errors import PluginError
from mpq_plugins.models.kinds import quantizable_weights
from tests.adapters import nets
from tests.helpers.plans import with_layer
from tests.helpers.says import naming

pytestmark = pytest.mark.filterwarnings("ignore")  # what backends warn of is theirs

BATCHES = list(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(8))
OFF = 1 + 0.45 * 2.0**-10
"""What float16 rounds down to 1: every weight by as much and the same way, so that outputs show it."""


def made() -> nn.Module:
    """A network whose convolutions' weights are all rounded down."""
    net = nets.made(nets.SmallNet)
    with torch.no_grad():
        for name in ("conv1", "conv2"):
            weight = net.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            weight.copy_(weight.sign() * OFF)
    return net


def planned(net: nn.Module, adapter: Adapter, *, fold_bn: bool = False, halves: tuple[str, ...] = ("conv2",)) -> Plan:
    """Four bits as the backend runs them, and layers at 16."""
    scheme = Affine(granularity="per_channel", symmetric=True)
    plan = Uniform(bits=4)(measure(net, scheme, (4,), fold_bn=fold_bn))
    for name in halves:
        plan = with_layer(plan, name, bits=16)
    return legalise(plan, adapter.CAPABILITIES)[0]


def loaded(name: str) -> Any:
    try:
        return registry.load("adapters", name)
    except PluginError as error:
        pytest.skip(f"{name}: its backend is not in this environment ({str(error)[-60:]})")


@pytest.mark.parametrize("fold_bn", [False, True])
@pytest.mark.parametrize("name", ["brevitas", "inc", "inc_classic", "pt2e", "torchao"])
def test_outputs_and_weights_are_those_of_apply(name: str, fold_bn: bool) -> None:
    adapter, net = loaded(name), made()
    plan = planned(net, adapter, fold_bn=fold_bn)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    quantized = adapter.apply(net, plan, BATCHES)
    checks = adapter.verify(quantized, plan, net, batch=BATCHES[0])
    assert {check.layer for check in checks} == {"conv1", "fc"}
    assert all(value.equal(before[key]) for key, value in net.state_dict().items())
    as_it_was = with_layer(plan, "conv2", bits=32)
    with pytest.raises(VerifyError):  # the law is one that would notice
        adapter.verify(adapter.apply(net, as_it_was, BATCHES), plan, net, batch=BATCHES[0])


@pytest.mark.parametrize("name", ["brevitas", "inc", "pt2e", "torchao"])
def test_channels_at_16_beside_32_bits_are_those_of_apply(name: str) -> None:
    """A layer that is all in float, of which some channels alone are rounded."""
    adapter, net = loaded(name), made()
    plan = planned(net, adapter, halves=())
    parts = [
        {"bits": 16, "channels": "0-1"},
        {"bits": 32, "channels": "2-" + str(quantizable_weights(net)["conv2"].shape[0] - 1)},
    ]
    layer = plan.by_name["conv2"].model_dump(mode="json", exclude_none=True) | {"parts": parts}
    layer.pop("bits")
    document = plan.document()
    document["layers"] = [layer if one["name"] == "conv2" else one for one in document["layers"]]
    mixed = Plan.from_document(document, "test")
    if not adapter.CAPABILITIES.float_parts:
        mixed = legalise(mixed, adapter.CAPABILITIES)[0]
    quantized = adapter.apply(net, mixed, BATCHES)
    adapter.verify(quantized, mixed, net, batch=BATCHES[0])
    simulated = apply(net, mixed.with_activation_bits(None))
    with torch.no_grad():
        difference = (quantized(BATCHES[0]) - simulated(BATCHES[0])).abs().max()
        unrounded = (apply(net, with_layer(plan, "conv2", bits=32))(BATCHES[0]) - simulated(BATCHES[0])).abs().max()
    assert difference < 0.5 * unrounded


@pytest.mark.parametrize("fold_bn", [False, True])
def test_fx_bakes_float16_before_or_after_folding_as_it_was_measured(fold_bn: bool) -> None:
    fx, net = loaded("fx"), made()
    plan = planned(net, fx, fold_bn=fold_bn)
    baked = fx.bake(net, plan)
    weight = quantizable_weights(baked)["conv2"]
    simulated = apply(net, plan)
    expected = quantizable_weights(simulated)["conv2"]
    if not fold_bn:
        norm: Any = simulated.get_submodule("bn2")
        expected = expected * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]
    assert torch.allclose(weight, expected, rtol=1e-6, atol=0)
    assert not torch.allclose(
        weight, quantizable_weights(fx.bake(net, planned(net, fx, halves=())))["conv2"], rtol=1e-6
    )
    fx.verify(fx.apply(net, plan, BATCHES), plan, net, batch=BATCHES[0])


@pytest.mark.parametrize(
    ("name", "function"), [("brevitas", "layer_map"), ("inc", "to_inc")]
)  # the backend's own calls on the user's model
def test_a_backends_own_call_refuses_16_bits(name: str, function: str) -> None:
    adapter = loaded(name)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plan = planned(net, adapter, halves=("1",))
    with pytest.raises(SettingError, match=naming("'1'", "16 bits", "float16", "Pin", "32")):
        getattr(adapter, function)(plan)
    getattr(adapter, function)(with_layer(plan, "1", bits=32))
