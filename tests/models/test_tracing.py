"""Which parameters a model uses outside their own layer, and that tracing it leaves it as it was."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq_plugins.errors import SourceError
from mpq_plugins.models import tracing
from mpq_plugins.models.tracing import Traced, borrowed_parameters, tensors_kept, trace
from tests.helpers import odd


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)


def net(body: Callable[[Pair, Tensor], Tensor]) -> Pair:
    cls = type("Net", (Pair,), {"forward": body})
    made: Pair = cls()
    return made


BODIES: dict[str, tuple[Callable[[Pair, Tensor], Tensor], set[str]]] = {
    "called": (lambda s, x: s.b(s.a(x)), set()),
    "functional": (lambda s, x: F.linear(s.a(x), s.a.weight), {"a.weight"}),
    "transposed": (lambda s, x: F.linear(s.a(x), s.a.weight.t()), {"a.weight"}),
    "data": (lambda s, x: s.a(x) @ s.a.weight.data, {"a.weight"}),
    "bias": (lambda s, x: s.a(x) + s.a.bias, {"a.bias"}),
    "a bias that is not there": (lambda s, x: s.b(x) if s.b.bias is None else s.b(x) + s.b.bias, {"b.bias"}),
    "dtype": (lambda s, x: s.b(s.a(x.to(s.a.weight.dtype))), set()),
    "device of both": (lambda s, x: s.b(s.a(x.to(s.a.weight.device)).to(s.b.weight)), set()),
    "size": (lambda s, x: s.b(s.a(x)).view(-1, s.a.weight.size(0)), set()),
    "as one of many": (lambda s, x: torch.stack([p.sum() for p in s.a.parameters()]).sum() + s.b(x),
                       {"a.weight", "a.bias"}),
}  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), BODIES.values(), ids=BODIES.keys())
def test_what_is_used_outside_its_layer(body: Callable[[Pair, Tensor], Tensor], expected: set[str]) -> None:
    assert borrowed_parameters(net(body)) == expected


class Own(nn.Linear):
    """Uses its weight itself, which is no borrowing."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)


class Holding(nn.Linear):
    """Uses another layer's weight, which it holds in a list."""

    def __init__(self, other: nn.Module, traceable: bool) -> None:
        super().__init__(4, 4)
        self.others, self.traceable = [other], traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and bool(x.sum() > 1e9):
            return x
        return super().forward(x) + F.linear(x, self.others[0].weight)  # type: ignore[arg-type]


def test_a_layers_own_use_is_none() -> None:
    assert borrowed_parameters(nn.Sequential(Own(4, 4), nn.Linear(4, 4))) == set()


@pytest.mark.parametrize("traceable", [True, False])
def test_layers_that_compute_in_their_own_way_are_looked_into(traceable: bool) -> None:
    first = nn.Linear(4, 4)
    found = borrowed_parameters(nn.Sequential(first, Holding(first, traceable)))
    assert found == ({"0.weight"} if traceable else {"0.weight", "0.bias"})


def test_a_view_of_the_same_memory_is_the_weight() -> None:
    model = net(lambda s, x: F.linear(s.a(x), vars(s)["view"]))
    vars(model)["view"] = model.a.weight.detach()
    assert borrowed_parameters(model) == {"a.weight"}


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.seen: list[Tensor] = []
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x)
        self.seen.append(self.last)
        self.count += 1
        y: Tensor = self.last + torch.ones(4)
        return y


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = Keeps()
    names = list(vars(model))
    trace(model)
    borrowed_parameters(model)
    assert list(vars(model)) == names
    assert model.seen == []
    assert model.count == 0
    assert model.a.bias is not None
    bare = nn.Sequential(nn.Linear(4, 4, bias=False))
    borrowed_parameters(bare)
    assert bare[0].bias is None


class Counts(nn.Module):
    """Writes into its own tensors as it runs: a count of its calls, and weights that it holds within bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("recent", torch.arange(6.0))

    def forward(self, x: Tensor) -> Tensor:
        calls, recent = self.get_buffer("calls"), self.get_buffer("recent")
        calls += 1
        recent[1:] = recent[:-1].clone()
        recent[::2].mul_(2)
        torch.add(recent, 1, out=recent)
        for parameter in self.parameters():
            parameter.data.clamp_(-0.01, 0.01)
        if bool(recent[0] > 1e6):
            raise ValueError("the state has run away")
        y: Tensor = self.a(x) * calls
        return y


def test_what_a_forward_writes_while_it_is_traced_is_put_back() -> None:
    model = Counts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model)
    borrowed_parameters(model)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    model.get_buffer("recent")[0] = 1e7
    before["recent"] = model.get_buffer("recent").clone()
    with pytest.raises(SourceError, match="the state has run away"):
        trace(model)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_model_that_cannot_be_traced_says_so() -> None:
    with pytest.raises(SourceError, match="Net: cannot be traced"):
        borrowed_parameters(net(lambda s, x: s.a(x) if bool(x.sum() > 0) else s.b(x)))


class LowRank(nn.Linear):
    """Has layers of its own, which it calls."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) + self.up(self.down(x))
        return y


def test_one_layer_that_cannot_be_looked_into_closes_no_other() -> None:
    first = nn.Linear(4, 4)
    closed = Holding(first, traceable=False)
    assert borrowed_parameters(nn.Sequential(first, closed, LowRank())) == {"0.weight", "0.bias"}


def test_one_trace_says_what_a_second_would() -> None:
    known = 0
    for make in odd.CONVOLUTIONS.values():
        for wiring in odd.WIRINGS.values():
            model = wiring(make(), nn.BatchNorm2d(odd.CHANNELS)).eval()
            try:
                lent = Traced(model)._closed.lent
            except SourceError:
                continue
            if lent is not None:
                known += 1
                assert lent == tracing._lent(model, ())
    assert known > 10


def test_a_model_is_traced_when_first_asked_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []
    closed = tracing._closed
    monkeypatch.setattr(tracing, "_closed", lambda model: traces.append(model) or closed(model))  # type: ignore[func-returns-value]
    traced = Traced(net(lambda s, x: s.b(s.a(x))))
    assert traces == []
    assert traced.lent == set()
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    assert traces == [traced.model]
    assert Traced.of(traced) is traced


def test_tensors_that_a_run_writes_into_are_kept() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("calls", torch.zeros(2))
    model.plain = torch.zeros(2)
    weight = model.weight.clone()
    with tensors_kept(model):
        for tensor in (model.calls, model.plain):
            assert isinstance(tensor, Tensor)
            tensor.add_(1)
    assert torch.equal(model.calls, torch.zeros(2))  # type: ignore[arg-type]
    assert torch.equal(model.plain, torch.zeros(2))
    assert model.weight.equal(weight)
