"""Models as users write them: what correcting and measuring must not misread."""

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import (
    Affine,
    Budget,
    LayerTable,
    MismatchError,
    SettingError,
    Uniform,
    apply,
    measure,
    sensitivity,
)
from mpq_plugins.reconstruction.rounding import Rounding
from mpq_plugins.simulation.synthetic import synthetic_batches

SCHEME = Affine(granularity="per_channel")
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "compensated")


class NormAct(nn.BatchNorm2d):
    """Normalises and rectifies."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class Net(nn.Module):
    """Two convolutions with BatchNorm and ReLU, in one module or in two; (N, 3, 8, 8) -> (N, 5)."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        kind = NormAct if joint else nn.BatchNorm2d
        self.joint = joint
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), kind(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), kind(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            x = norm(conv(x)) if self.joint else torch.relu(norm(conv(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class Changes(nn.Sequential):
    """Changes its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2).add_(1)
        for module in self:
            x = module(x)
        return x


class Aside(nn.Module):
    """Has a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.spare = nn.Linear(6, 4), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x)
        return logits


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def table_of(model: nn.Module, bits: tuple[int, ...] = (2, 8)) -> LayerTable:
    return measure(model, SCHEME, bits, per_channel=True)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_batch_norm_that_does_more_keeps_doing_it(rounding: Rounding) -> None:
    torch.manual_seed(0)
    plain = Net(joint=False).eval()
    joint = Net(joint=True).eval()
    joint.load_state_dict(plain.state_dict())
    plan = Budget(average_bits=3.0, bits=(2, 3, 4))(table_of(plain, (2, 3, 4)))
    images = batch(32, 3, 8, 8)
    outputs = [apply(net, plan, calibrate=[images], rounding=rounding)(images) for net in (plain, joint)]
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    folded = [apply(net, Uniform(bits=8)(measure(net, bits=[8]))) for net in (plain, joint)]
    assert torch.allclose(folded[1](images), joint(images), atol=0.05)
    assert joint.bn1.momentum == plain.bn1.momentum
    assert int(joint.bn1.num_batches_tracked or 0) == 0


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_forward_that_changes_its_input_changes_no_batch(rounding: Rounding) -> None:
    torch.manual_seed(0)
    model = Changes(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    inputs = batch(16, 6)
    kept = inputs.clone()
    found = sensitivity(model, table_of(model), "kl", [inputs])
    expected = sensitivity(nn.Sequential(*model), table_of(model), "kl", [kept * 2 + 1])
    assert torch.equal(inputs, kept)
    for own, other in zip(found.layers, expected.layers, strict=True):
        assert own.sensitivities["kl"] == pytest.approx(other.sensitivities["kl"])
    apply(model, Budget(average_bits=4, bits=(2, 8))(found), calibrate=[inputs], rounding=rounding)
    assert torch.equal(inputs, kept)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_shared_bias_is_corrected_for_each_layer(rounding: Rounding) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    model[2].bias = model[0].bias
    plan = Budget(average_bits=2, bits=(2,))(table_of(model))
    inputs = batch(64, 8)
    off, corrected = (
        float((tried(inputs) - model(inputs)).mean(0).abs().max().detach())
        for tried in (apply(model, plan), apply(model, plan, calibrate=[inputs], rounding=rounding))
    )
    assert corrected < 1e-5 < off


@pytest.mark.parametrize("kind", ["kl", "distance", "fisher", "hessian", "output_mse"])
def test_a_layer_that_no_input_reaches_is_an_error(kind: str) -> None:
    model = Aside()
    with pytest.raises(SettingError, match=r"layer 'spare': no batch reaches it"):
        sensitivity(model, table_of(model), kind, [batch(8, 6)])


def test_state_passed_sideways_is_not_missed() -> None:
    class Keeps(nn.Module):
        """Leaves something for another module."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            self.kept = y.detach()
            return y

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = Keeps(), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.middle(self.first(x)))
            kept = self.first.kept
            assert kept is not None
            logits: Tensor = self.last(y + kept)
            return logits

    torch.manual_seed(0)
    model, inputs = Skips().eval(), [batch(16, 6), batch(16, 6) + 1]
    table = table_of(model)
    found = sensitivity(model, table, "kl", inputs)
    for position, layer in enumerate(found.layers):
        for k, bits in enumerate(table.bits):
            quantized = apply(model, Budget(average_bits=32, bits=(2, 8), pin=tuple(
                f"{other.name}={bits if other.name == layer.name else 32}" for other in table.layers
            ))(table))  # fmt: skip
            p, q = (torch.cat([net(x).double().log_softmax(1) for x in inputs]) for net in (model, quantized))
            divergence = float((p.exp() * (p - q)).sum(1).mean().detach())
            assert found.layers[position].sensitivities["kl"][k] == pytest.approx(divergence, rel=1e-3, abs=1e-8)


def test_another_models_table_is_refused() -> None:
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Linear(6, 4)) for _ in range(2))
    with pytest.raises(MismatchError, match="other weights than those the table was measured on"):
        sensitivity(second, table_of(first), "output_mse", [batch(8, 6)])


def test_nested_inputs_are_counted_by_sample() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, given: dict[str, dict[str, Tensor]]) -> Tensor:
            logits: Tensor = self.fc(given["in"]["x"])
            return logits

    torch.manual_seed(0)
    model, inputs = Nested().eval(), batch(8, 6)
    flat = nn.Sequential(model.fc)
    for kind in ("fisher", "hessian", "output_mse"):
        nested = sensitivity(model, table_of(model), kind, [({"in": {"x": inputs}},)]).layers[0]
        plain = sensitivity(flat, table_of(flat), kind, [inputs]).layers[0]
        assert nested.sensitivities[kind] == pytest.approx(plain.sensitivities[kind])


def test_a_model_that_cannot_be_copied_is_an_error() -> None:
    model = Net(joint=False).eval()
    plan = Uniform(bits=8)(table_of(model))
    model.last = model(batch(2, 3, 8, 8))  # an output with its graph
    for work in (lambda: apply(model, plan), lambda: synthetic_batches(model, (2, 3, 8, 8))):
        with pytest.raises(SettingError, match="Net: cannot be copied"):
            work()
