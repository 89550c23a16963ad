"""The law of the FX adapter: what `prepare` accepts converts, runs and gives what `apply` does; the rest is refused."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization.quantize_fx import convert_fx

from mpq_plugins import Affine, Uniform, measure
from mpq_plugins.adapters import fx
from mpq_plugins.errors import MPQError
from tests.adapters.fx.test_preparation import pytestmark as warnings_of_torch
from tests.adapters.odd_graphs import OPERATORS, Steps, odd_net
from tests.adapters.rounding import distances, simulations

pytestmark = warnings_of_torch
PER_CHANNEL = Affine(granularity="per_channel")


def outcome(steps: Steps, seed: int) -> float | str:
    """How far the converted net is off, in units of what is allowed; or why the net is refused."""
    try:
        net, images = odd_net(steps, seed)
    except RuntimeError as error:
        return f"no network: {error}"  # a view of what is not contiguous
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plan = Uniform(bits=8)(measure(net, PER_CHANNEL, (8,), skip=net.float_layers())).with_activation_bits(8)
    try:
        prepared = fx.prepare(net, plan, images)
    except MPQError as error:
        return str(error)
    finally:
        assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    expected, simulated = simulations(net, plan, images)
    with torch.no_grad():
        in_float = prepared(images.clone())
        assert max(distances(in_float, expected)) < 1e-3
        converted = convert_fx(prepared)
        reached = converted(images.clone())
    fx.verify(converted, plan, net, batch=images, tolerance=0.5)
    allowed = max(0.03, 3 * max(distances(simulated, expected)))
    worst = max(distances(reached, expected))
    assert worst < allowed, f"{worst:.1%} off, and 8 bits in and out of every layer cost {allowed / 3:.1%}"
    return worst / allowed


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(OPERATORS)), st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=5
    ),
    st.integers(0, 1000),
)
@settings(max_examples=12)
def test_what_is_accepted_runs_and_is_close(steps: Steps, seed: int) -> None:
    outcome(steps, seed)
