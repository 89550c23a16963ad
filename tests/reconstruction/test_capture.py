"""What a block is called with and gives, seen from outside and without a trace."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

import mpq_plugins as mpq
from mpq_plugins import SettingError, WeightError
from mpq_plugins.reconstruction.capture import Call, call_order, calls_of, first_tensor, inputs_of

X = torch.arange(6.0).reshape(2, 3)


class Scale(nn.Module):
    """A block of many ways to be called and to answer."""

    def __init__(self, answer: str = "tensor", in_place: bool = False) -> None:
        super().__init__()
        self.answer, self.in_place = answer, in_place
        self.seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((args, kwargs))
        x = args[0] if args else kwargs["x"]
        y = x.mul_(2) if self.in_place else x * 2
        answers: dict[str, Any] = {
            "tensor": y, "tuple": (None, y, y + 1), "dict": {"a": y, "b": y + 1}, "text": "none", "nothing": None,
            "integers": y.long(), "number": y.sum(), "nan": y / 0, "infinite": y * float("inf"), "nested": [[(y,)], y],
        }  # fmt: skip
        return answers[self.answer]


class Model(nn.Module):
    """Calls its block so many times, each with something else; then another module."""

    def __init__(self, block: Scale, times: int = 1) -> None:
        super().__init__()
        self.block, self.times = block, times
        self.after, self.afters = nn.Identity(), 0

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        for k in range(self.times):
            found = self.block(x + k, k, flag=flag, pair=(x.long(), {"deep": x.flatten()}))
            if isinstance(found, Tensor):
                found += 100  # after the block, in place
        self.afters += 1
        answer: Tensor = self.after(x)
        return answer


def no_hooks(model: nn.Module) -> bool:
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def given(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = tree_unflatten(list(call.leaves), call.spec)
    return args, kwargs


def is_call(call: Call, k: int, flag: bool) -> None:
    args, kwargs = given(call)
    assert args[0].equal(X + k)
    assert args[1:] == (k,)
    assert set(kwargs) == {"flag", "pair"}
    assert kwargs["flag"] is flag
    assert kwargs["pair"][0].equal(X.long())
    assert kwargs["pair"][1]["deep"].equal(X.flatten())


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_inputs_are_what_every_call_was_given(times: int, in_place: bool) -> None:
    model = Model(Scale(in_place=in_place), times)
    calls = inputs_of(model, model.block, {"x": X.clone(), "flag": True}, times)
    assert len(calls) == times
    for k, call in enumerate(calls):
        is_call(call, k, True)
        assert call.output is None
    assert no_hooks(model)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_outputs_are_as_the_block_gave_them(times: int, in_place: bool) -> None:
    model = Model(Scale(in_place=in_place), times)
    calls = calls_of(model, model.block, "block", (X.clone(), False), times)
    assert len(calls) == times
    for k, call in enumerate(calls):
        is_call(call, k, False)
        assert call.output is not None
        assert call.output.equal((X + k) * 2)  # and not what became of it
    assert no_hooks(model)


@pytest.mark.parametrize("answer", ["tuple", "dict", "nested"])
def test_of_several_outputs_the_first_is_taken(answer: str) -> None:
    model = Model(Scale(answer))
    (call,) = calls_of(model, model.block, "block", X, 1)
    assert call.output is not None
    assert call.output.equal(X * 2)


def test_inputs_by_name_alone() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Scale()

        def forward(self, x: Tensor) -> Any:
            return self.block(x=x, mask=None)

    model = ByName()
    (call,) = calls_of(model, model.block, "block", X, 1)
    args, kwargs = given(call)
    assert args == ()
    assert kwargs["mask"] is None
    assert kwargs["x"].equal(X)


def test_a_run_ends_where_one_call_was_seen() -> None:
    model = Model(Scale())
    inputs_of(model, model.block, X, 1)
    assert (len(model.block.seen), model.afters) == (0, 0)
    calls_of(model, model.block, "block", X, 1)
    assert (len(model.block.seen), model.afters) == (1, 0)
    inputs_of(model, model.block, X, 2)  # a second call might come
    assert (len(model.block.seen), model.afters) == (2, 1)
    calls_of(model, model.block, "block", X, 2)
    assert (len(model.block.seen), model.afters) == (3, 2)


def test_a_batch_that_does_not_reach_the_block_has_no_calls() -> None:
    model = Model(Scale(), times=0)
    assert inputs_of(model, model.block, X, 1) == []
    assert calls_of(model, model.block, "block", X, 1) == []


def test_what_is_captured_takes_no_gradients_and_leaves_the_batch_alone() -> None:
    model = Model(Scale(in_place=True))
    batch = X.clone()
    (call,) = calls_of(model, model.block, "block", batch, 1)
    assert batch.equal(X)
    assert call.output is not None
    assert not call.output.requires_grad
    assert not any(leaf.requires_grad for leaf in call.leaves if isinstance(leaf, Tensor))


@pytest.mark.parametrize("answer", ["nan", "infinite"])
@pytest.mark.parametrize("times", [1, 2])
def test_values_that_are_not_finite_name_the_block(answer: str, times: int) -> None:
    model = Model(Scale(answer), times)
    with pytest.raises(WeightError, match=r"block 'a\.block': gives NaN or infinite values in the float model"):
        calls_of(model, model.block, "a.block", X, times)
    assert no_hooks(model)


@pytest.mark.parametrize(
    ("answer", "said"), [("text", "str"), ("nothing", "NoneType"), ("integers", "Tensor"), ("number", "Tensor")]
)
def test_outputs_that_are_no_values_name_the_block(answer: str, said: str) -> None:
    model = Model(Scale(answer))
    with pytest.raises(SettingError, match=rf"block 'block': gives a {said}, no values to come close to"):
        calls_of(model, model.block, "block", X, 1)
    assert no_hooks(model)


def test_a_batch_that_the_model_does_not_run_on_leaves_no_hooks() -> None:
    model = Model(Scale())
    batch = (X, False, "too many")
    for run in (
        lambda: inputs_of(model, model.block, batch, 2),
        lambda: calls_of(model, model.block, "block", batch, 2),
        lambda: call_order(model, ["block"], batch),
    ):
        with pytest.raises(SettingError, match="Model does not run on a batch"):
            run()
        assert no_hooks(model)


def test_modules_are_counted_in_the_order_of_their_first_calls() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.unused = nn.Identity(), nn.Identity(), nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.a(self.c(self.b(self.c(x))))
            return found

    model = Several()
    counts = call_order(model, ["unused", "a", "b", "c"], X)
    assert list(counts.items()) == [("c", 2), ("b", 1), ("a", 1)]
    assert list(call_order(model, ["a", "b"], X)) == ["b", "a"]
    assert no_hooks(model)


class Repeating(nn.Module):
    """Calls its block as often as the batch says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Linear(3, 3)

    def forward(self, x: Tensor, times: int) -> Tensor:
        for k in range(times):
            x = self.block(x + k)
        return x


def test_calls_count_alike_in_whatever_batch_they_are() -> None:
    net = Repeating().eval()
    plan = mpq.Uniform(bits=3)(mpq.measure(net, bits=(3,)))
    nearest = []
    for batches in ([(X, 2), (-X, 1)], [(-X, 1), (X, 2)]):
        reports: list[mpq.BlockReport] = []
        mpq.reconstruct(net, plan, batches, steps=1, finished=reports.append)
        nearest.append(reports[0].nearest)
    assert nearest[0] == pytest.approx(nearest[1], rel=1e-5)


class Answer(NamedTuple):
    loss: Tensor | None
    hidden: Tensor


def test_the_first_tensor_of_a_structure_is_found() -> None:
    assert first_tensor(Answer(None, X), "b") is X
    with pytest.raises(SettingError, match="block 'b'"):
        first_tensor(Answer(None, X.long()), "b")
