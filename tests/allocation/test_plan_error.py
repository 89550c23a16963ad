"""The error of a plan from its table, against the weights it makes."""

import pytest
import torch

from mpq_plugins import PTILMPQ, Affine, LayerTable, MixQuant, Piecewise, Plan, apply, measure
from mpq_plugins.allocation.plan_error import plan_error
from mpq_plugins.errors import SettingError
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.plans.scheme import Scheme
from tests.helpers.nets import conv_net, tied_net


def actual(plan: Plan, metric: str) -> float:
    net = conv_net()
    before, after = quantizable_weights(net), quantizable_weights(apply(net, plan))
    error = torch.cat([(after[name] - before[name]).detach().double().flatten() for name in before])
    weights = torch.cat([before[name].detach().double().flatten() for name in before])
    return float((error.abs() / weights.abs()).mean() if metric == "relative" else error.square().mean())


def table(scheme: Scheme, per_channel: bool = True) -> LayerTable:
    return measure(conv_net(), scheme, per_channel=per_channel, fold_bn=False)


@pytest.mark.parametrize("metric", ["relative", "mse"])
@pytest.mark.parametrize(
    "scheme",
    [Affine(granularity="per_channel"), Piecewise(granularity="per_channel"),
     Piecewise(granularity="per_channel", storage="shared")],
)  # fmt: skip
def test_it_is_the_error_of_the_weights(scheme: Scheme, metric: str) -> None:
    measured = table(scheme)
    for allocator in (MixQuant(qem=3), PTILMPQ(alpha=0.5, other_bits=(4, 2))):
        plan = allocator(measured)
        assert plan_error(measured, plan, metric) == pytest.approx(actual(plan, metric), rel=1e-5)


def test_it_says_when_the_table_cannot_tell() -> None:
    per_tensor = table(Affine())
    assert plan_error(per_tensor, MixQuant()(per_tensor)) is not None
    assert plan_error(per_tensor, PTILMPQ()(per_tensor)) is None  # parts get scales of their own
    without = table(Affine(granularity="per_channel"), per_channel=False)
    assert plan_error(without, PTILMPQ()(without)) is None
    assert plan_error(without, PTILMPQ()(table(Piecewise(granularity="per_channel")))) is None
    with pytest.raises(SettingError, match="metric: 'max_abs' is not allowed; relative, mse"):
        plan_error(per_tensor, MixQuant()(per_tensor), "max_abs")
    with pytest.raises(SettingError, match="plan: has other layers than the table"):
        plan_error(per_tensor, MixQuant()(measure(tied_net())))
