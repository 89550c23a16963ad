"""Whether biases and statistics do what they do in torch's classes, tried on modules that do and that do not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq_plugins import Affine, Uniform, correct, measure
from mpq_plugins.models.behaviour import adds_its_bias, follows_its_statistics
from tests.helpers import odd
from tests.helpers.says import naming


class Unbiased(nn.Linear):
    """Has a bias and does not use it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), self.weight)


class Gained(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Centred(nn.BatchNorm2d):
    """Takes its statistics from every image."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input - input.mean((2, 3), keepdim=True))


LAYERS: list[tuple[Callable[[], nn.Module], int, bool]] = [
    (lambda: nn.Linear(6, 6), 1, True),
    (lambda: nn.Linear(6, 6, bias=False), 1, False),
    (lambda: Unbiased(6, 6), 1, False),
    (lambda: Gained(6, 6), 1, False),
    (lambda: odd.conv(odd.Standardised), 1, True),
    (lambda: odd.conv(odd.Inside), 1, True),
    (lambda: odd.conv(odd.Rectified), 1, False),
    (lambda: odd.conv(odd.Branching), 1, False),
    (odd.patched, 1, False),
    (lambda: odd.hooked(lambda module, args, output: output + 1), 1, True),
]
NORMS: list[tuple[Callable[[], nn.Module], bool]] = [
    (lambda: nn.BatchNorm2d(odd.CHANNELS), True),
    (lambda: odd.NormAct(odd.CHANNELS), True),
    (lambda: odd.OfBatch(odd.CHANNELS), False),
    (lambda: odd.Shifted(odd.CHANNELS), False),
    (lambda: Centred(odd.CHANNELS), False),
    (lambda: nn.BatchNorm2d(odd.CHANNELS, track_running_stats=False), False),
]


@pytest.mark.parametrize(("make", "axis", "adds"), LAYERS)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_bias_that_is_added_is_told_from_others(
    make: Callable[[], nn.Module], axis: int, adds: bool, by_name: bool
) -> None:
    torch.manual_seed(0)
    layer = make()
    x = odd.inputs() if isinstance(layer, nn.Conv2d) else torch.randn(8, 6)
    given: tuple[tuple[Tensor, ...], dict[str, Tensor]] = ((x,), {})
    if by_name and type(layer).forward.__code__.co_varnames[1] == "input":
        given = ((), {"input": x})
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert adds_its_bias(layer, axis, *given) is adds
    assert all(value.equal(before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(("make", "follows"), NORMS)
def test_statistics_that_normalise_are_told_from_others(make: Callable[[], nn.Module], follows: bool) -> None:
    torch.manual_seed(0)
    norm = make().train()
    with torch.no_grad():
        for _ in range(3):
            norm(odd.inputs(1.5) + 0.3)
    norm.eval()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert follows_its_statistics(norm, (odd.inputs(),), {}) is follows
    assert follows_its_statistics(norm, (), {"input": odd.inputs()}) is follows
    assert all(value.equal(before[name]) for name, value in norm.state_dict().items())


@pytest.mark.slow
def test_what_does_otherwise_is_not_corrected_and_named() -> None:
    model = odd.Recipe((("rectified", "shifted", "Wiring"), ("standardised", "with activation", "Wiring")), "Cosine", 4)
    net, batch = model.build(), odd.inputs()
    plan = Uniform(bits=3)(measure(net, Affine(granularity="per_channel"), [3]))
    with pytest.warns(UserWarning, match=naming("not corrected", "'body.0.layer'", "'body.0.norm'", "'head'")):
        corrected = correct(net, plan, [batch])
    own, others = net.state_dict(), corrected.state_dict()
    changed = {name for name in own if not own[name].equal(others[name])}
    assert changed == {"body.1.norm.running_mean", "body.1.norm.running_var"}
