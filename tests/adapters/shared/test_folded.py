"""What every adapter is given: a plan, and the model that it was made for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpq_plugins import Affine, Uniform, apply, measure
from mpq_plugins.errors import MismatchError, SettingError
from tests.adapters import nets
from tests.helpers.nets import tied_net

brevitas = pytest.importorskip("mpq_plugins.adapters.brevitas")
fx = pytest.importorskip("mpq_plugins.adapters.fx")
pt2e = pytest.importorskip("mpq_plugins.adapters.pt2e")
torchao = pytest.importorskip("mpq_plugins.adapters.torchao")

TRACED = pytest.importorskip("torch").fx.symbolic_trace(nets.made(nets.SmallNet))
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "fx.prepare": lambda plan, model: fx.prepare(model, plan, None),
    "fx.bake": lambda plan, model: fx.bake(model, plan),
    "fx.verify": lambda plan, model: fx.verify(TRACED, plan, model),
    "torchao.apply": lambda plan, model: torchao.apply(model, plan),
    "torchao.to_config": lambda plan, model: torchao.to_config(plan, model),
    "torchao.verify": lambda plan, model: torchao.verify(TRACED, plan, model),
    "pt2e.PlanQuantizer": pt2e.PlanQuantizer,
    "pt2e.verify": lambda plan, model: pt2e.verify(TRACED, plan, model),
    "brevitas.to_brevitas": lambda plan, model: brevitas.to_brevitas(model, plan),
    "brevitas.layer_map": lambda plan, model: brevitas.layer_map(plan, model),
    "brevitas.verify": lambda plan, model: brevitas.verify(TRACED, plan, model),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_plan_or_no_module_or_another_models_plan_is_refused(call: str) -> None:
    model = nets.made(nets.SmallNet)
    plan = Uniform(bits=8)(measure(model, Affine(granularity="per_channel"), (8,))).with_activation_bits(8)
    for given, message in (
        (("plan.json", model), "plan: is a str, no Plan; Plan.load it first"),
        ((model, plan), "plan: is a SmallNet, no Plan; the model comes before the plan"),
        ((plan, "net.safetensors"), "model: is a str, no module"),
    ):
        with pytest.raises(SettingError, match=message):
            CALLS[call](*given)
    with pytest.raises(MismatchError, match="the plan was made for another model"):
        CALLS[call](plan, tied_net())


@pytest.mark.parametrize("symmetric", [True, False, "full"])
def test_what_is_rounded_stochastically_has_the_simulations_codes_whatever_norm_is_folded_in(symmetric: Any) -> None:
    """An oracle without codes: the plan's own weights, times what folding the norm by hand multiplies channels by."""
    model: Any = nets.made(nets.SmallNet)
    with torch.no_grad():
        model.bn1.weight[::2] *= -1
    scheme = Affine(granularity="per_channel", symmetric=symmetric, stochastic=7)
    plan = Uniform(bits=3)(measure(model, scheme, (3,), fold_bn=False)).with_activation_bits(8)
    kept: Any = apply(model, plan.with_activation_bits(None))
    integers = fx.folded_integers(plan, model)
    for name, norm in (("conv1", "bn1"), ("conv2", "bn2")):
        bn = kept.get_submodule(norm)
        factor = bn.weight / (bn.running_var + bn.eps).sqrt()
        expected = (kept.get_submodule(name).weight * factor.view(-1, 1, 1, 1)).detach()
        torch.testing.assert_close(integers[name].dequantized(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(integers["fc"].dequantized(), kept.fc.weight.detach(), rtol=0, atol=0)
