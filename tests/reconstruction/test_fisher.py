"""Squared gradients of the model's own predictions: against the softmax's gradient by hand."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import SettingError
from mpq_plugins.reconstruction.fisher import importance_of


class Net(nn.Module):
    """Logits = head(body(x)), given in several ways."""

    def __init__(self, answer: str = "logits") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.unused, self.answer = nn.Linear(3, 3), answer
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        self.unused(x)
        hidden = self.body(x)
        logits = self.head(hidden)
        if self.answer == "in place":
            hidden.mul_(0)
        answers: dict[str, Any] = {
            "attribute": Output(x, logits), "dict": {"logits": logits}, "one": logits[:, :1], "flat": logits.sum(),
            "classes": logits.argmax(1), "detached": logits.detach(), "text": "none",
        }  # fmt: skip
        return answers.get(self.answer, logits)


class Output(NamedTuple):
    loss: Tensor
    logits: Tensor


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)) * 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of(net: nn.Module, block: str, x: Any = X, seed: int = 0) -> list[Tensor]:
    return importance_of(net.eval(), net.get_submodule(block), block, x, generator(seed))


def by_hand(net: Net, x: Tensor) -> Tensor:
    """Squared gradients by label, (labels, samples, hidden): the softmax's, (p - onehot) W."""
    p = net.head(net.body(x)).double().softmax(-1)
    return torch.stack([((p - torch.eye(3)[k]) @ net.head.weight.double()).square() for k in range(3)])


def labels_of(found: Tensor, candidates: Tensor) -> tuple[list[int], float]:
    """Which label each sample was given, where all are of one scale, and how far from that any value is."""
    for first in range(3):
        scale = found[0, 0] / candidates[first, 0, 0]
        errors = (found.double() - candidates * scale).abs().amax(-1)
        if float(errors.amin(0).max()) < 1e-4:
            return errors.argmin(0).tolist(), float(errors.amin(0).max())
    raise AssertionError("no labels explain these gradients")


def test_it_is_the_squared_gradient_at_labels_of_the_models_own() -> None:
    net = Net()
    (found,) = of(net, "body")
    assert found.shape == (5, 4)
    assert float(found.mean()) == pytest.approx(1, rel=1e-5)
    labels_of(found, by_hand(net, X))


def test_labels_are_drawn_from_the_predictions() -> None:
    net = Net()
    p = net.head(net.body(X)).softmax(-1)
    rounds = 400
    many = X.repeat(rounds, 1)
    labels, _ = labels_of(of(net, "body", many)[0], by_hand(net, many))
    counts = F.one_hot(torch.tensor(labels), 3).reshape(rounds, 5, 3).sum(0)
    assert float((counts / rounds - p).abs().max()) < 0.1  # 4 standard deviations of 1/2


def test_a_generator_decides() -> None:
    one, same, other = (of(Net(), "body", seed=seed)[0] for seed in (3, 3, 4))
    assert one.equal(same)
    assert not one.equal(other)


@pytest.mark.parametrize("answer", ["attribute", "in place"])
def test_logits_are_found_and_what_follows_may_change_the_output(answer: str) -> None:
    assert of(Net(answer), "body")[0].equal(of(Net(), "body")[0])


def test_every_position_of_a_sequence_has_a_label() -> None:
    net = Net()
    x = X[:, None].repeat(1, 2, 1)
    (found,) = of(net, "body", x)
    assert found.shape == (5, 2, 4)
    labels_of(found.reshape(10, 4), by_hand(net, x.reshape(10, 3)))


@pytest.mark.parametrize("block", ["body", "head"])
def test_nothing_of_the_net_is_changed(block: str) -> None:
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    of(net, block)
    assert all(before[name].equal(value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


class Twice(nn.Module):
    """One block, called side by side or in a row."""

    def __init__(self, in_a_row: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.head, self.in_a_row = nn.Linear(3, 3), nn.Linear(3, 4), in_a_row
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(self.block(x)) if self.in_a_row else self.block(x) + self.block(x * 2))
        return logits


@pytest.mark.parametrize("in_a_row", [False, True])
def test_every_call_has_its_own(in_a_row: bool) -> None:
    net = Twice(in_a_row)
    first, second = of(net, "block")
    assert [float(own.mean()) for own in (first, second)] == pytest.approx([1, 1], rel=1e-5)
    if not in_a_row:
        assert torch.allclose(first, second)  # a sum passes on one gradient
    # The same labels and so the same gradient, but for scale, of the last call's output.
    logits = net(X)
    candidates = torch.stack([((logits.softmax(-1) - torch.eye(4)[k]) @ net.head.weight).square() for k in range(4)])
    ratios = (second / candidates).reshape(4, 5, 3)
    spread = ratios.amax(-1) / ratios.amin(-1)
    assert (spread.amin(0) < 1.001).all()


class Structured(nn.Module):
    """A block that gives more than a tensor."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.answer = nn.Linear(3, 4), answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.fc(x))


class Around(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Any], pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = Structured(answer), nn.Linear(4, 3)
        self.pick = pick

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pick(self.body(x)))
        return logits


@pytest.mark.parametrize(
    ("answer", "pick"), [(lambda y: (y, None), lambda out: out[0]), (lambda y: {"h": y, "n": 1}, lambda out: out["h"])]
)
def test_blocks_may_give_structures(answer: Callable[[Tensor], Any], pick: Callable[[Any], Tensor]) -> None:
    assert of(Around(answer, pick), "body")[0].equal(of(Net(), "body")[0])


@pytest.mark.parametrize(
    ("answer", "block", "said"),
    [
        ("logits", "unused", "block 'unused': .*does not depend"),
        ("dict", "body", "block 'body': the model gives a dict that is no logits"),
        ("one", "body", "block 'body': the model gives a Tensor that is no logits"),
        ("flat", "body", "block 'body': the model gives a Tensor that is no logits"),
        ("classes", "body", "block 'body': the model gives a Tensor that is no logits"),
        ("detached", "body", "block 'body': .*does not depend"),
        ("text", "body", "block 'body': the model gives a str that is no logits"),
    ],
)
def test_models_without_logits_that_depend_on_the_block_are_refused(answer: str, block: str, said: str) -> None:
    net = Net(answer)
    with pytest.raises(SettingError, match=said) as error:
        of(net, block)
    assert "loss='mse'" in str(error.value)
    assert not any(module._forward_hooks for module in net.modules())


def test_an_output_that_is_used_and_does_not_matter_is_refused() -> None:
    net = Net()
    net.head.weight.zero_()
    with pytest.raises(SettingError, match="block 'body': the predictions do not depend on it"):
        of(net, "body")


class Skipping(nn.Module):
    """Calls its block where the batch says so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.head = nn.Linear(3, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        for _ in range(times):
            x = self.block(x)
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("loss", ["mse", "fisher"])
@pytest.mark.parametrize("times", [(1, 0), (0, 1), (2, 2)])
def test_batches_may_call_a_block_more_often_or_not_at_all(loss: Any, times: tuple[int, ...]) -> None:
    net = Skipping().eval()
    plan = mpq.Uniform(bits=3)(mpq.measure(net, bits=(3,)))
    learned = mpq.reconstruct(net, plan, [(X, count) for count in times], steps=3, loss=loss)
    mpq.verify(learned, plan)
