"""A model that cannot be copied is told by what in it cannot, with a remedy that works."""

import functools
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import weight_norm

from mpq_plugins.errors import SettingError
from mpq_plugins.models.copying import duplicate
from tests.helpers.says import naming


def holding(value: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    vars(model[1])["kept"] = value
    return model


def test_a_copy_shares_nothing() -> None:
    model: Any = holding([torch.ones(2)])
    copied: Any = duplicate(model)
    assert copied[0].weight.equal(model[0].weight)
    assert copied[0].weight is not model[0].weight
    assert copied[1].kept[0] is not vars(model[1])["kept"][0]


def test_what_cannot_be_copied_is_named(tmp_path: Path) -> None:
    computed = nn.Linear(3, 2)(torch.ones(1, 3))
    with (tmp_path / "log").open("w") as file:
        for value, said in (
            (threading.Lock(), r"'1.kept' is a lock .*Set it to None"),
            (file, r"'1.kept' is a TextIOWrapper .*Set it to None"),
            ((number for number in range(3)), r"'1.kept' is a generator .*Set it to None"),
            (computed, r"'1.kept' is a Tensor .*computed in an earlier run.*no_grad"),
            ({"outputs": [computed]}, r"'1.kept' is a dict"),
        ):
            with pytest.raises(SettingError, match=rf"^Sequential: cannot be copied.*: {said}"):
                duplicate(holding(value))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_a_hook_computed_and_the_remedy() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(3, 2)))
    model(torch.ones(1, 3))
    with pytest.raises(SettingError, match=naming("'0.weight'", "Tensor", "torch.no_grad()")):
        duplicate(model)
    with torch.no_grad():
        model(torch.ones(1, 3))
    duplicate(model)


def test_models_made_in_inference_mode_are_copied() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 2)
    assert duplicate(model).get_parameter("weight").equal(model.weight)


class Net(nn.Module):
    """Two layers, one of which some function takes for its own ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x))
        return y


def patched_by_closure(model: Net) -> None:
    model.first.forward = lambda x: x @ model.first.weight  # type: ignore[assignment,method-assign]


def patched_around_the_old(model: Net) -> None:
    old = model.first.forward
    model.first.forward = lambda x: 2 * old(x)  # type: ignore[assignment,method-assign]


def hooked_with_another_layer(model: Net) -> None:
    other = model.second
    model.first.register_forward_hook(lambda _, args, y: y + other(args[0]))


def hooked_with_the_whole(model: Net) -> None:
    model.first.register_forward_pre_hook(lambda _, args: args[0] @ model.second.weight)


def by_default_argument(model: Net) -> None:
    model.first.forward = lambda x, layer=model.second: layer(x)  # type: ignore[method-assign,misc]


def in_a_partial(model: Net) -> None:
    old = model.first.forward
    model.first.forward = functools.partial(lambda own, x: 2 * old(x), model.first)  # type: ignore[method-assign]


def under_a_context(model: Net) -> None:
    model.first.forward = torch.no_grad()(model.first.forward)  # type: ignore[method-assign]


def around_another_patch(model: Net) -> None:
    patched_around_the_old(model)
    inner = model.first.forward
    model.first.forward = lambda x: inner(x) + 1  # type: ignore[assignment,method-assign]


def by_a_method(model: Net) -> None:
    old = model.first.forward
    model.first.forward = types.MethodType(lambda own, x: old(x), model.first)  # type: ignore[method-assign]


def by_a_partial_around_a_layer(model: Net) -> None:
    run = functools.partial(nn.Linear.forward, model.second)
    model.first.forward = lambda x: run(x)  # type: ignore[assignment,method-assign]


def by_a_list(model: Net) -> None:
    layers = [model.first, model.second]
    model.first.register_forward_hook(lambda _, args, y: layers[1](y))


@pytest.mark.parametrize(
    "change",
    [
        patched_by_closure, patched_around_the_old, hooked_with_another_layer, hooked_with_the_whole,
        by_default_argument, in_a_partial, under_a_context, around_another_patch, by_a_method,
        by_a_partial_around_a_layer, by_a_list,
    ],
)  # fmt: skip
def test_functions_that_would_use_the_originals_weights_are_refused(change: Any) -> None:
    model = Net()
    change(model)
    with pytest.raises(SettingError, match=naming("'first'", "original", "MethodType")):
        duplicate(model)


def test_functions_that_use_none_and_methods_are_copied() -> None:
    model = Net()
    model.first.register_forward_hook(lambda _, __, y: model.seen.append(y.detach()))
    model.second.forward = types.MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), model.second)  # type: ignore[method-assign]
    copied: Any = duplicate(model)
    with torch.no_grad():
        copied.second.weight.zero_()
        copied.second.bias.zero_()
    assert not copied(torch.ones(1, 3)).any()
    assert model(torch.ones(1, 3)).any()


def test_a_partial_that_is_given_the_layer_is_copied() -> None:
    """As accelerate does: what a partial is given is copied with it, and so is the method that the layer keeps."""

    def new(own: Any, x: torch.Tensor) -> Any:
        return 2 * own.before(x)

    model: Any = Net()
    model.first.before = model.first.forward
    model.first.forward = functools.update_wrapper(functools.partial(new, model.first), model.first.before)
    copied: Any = duplicate(model)
    with torch.no_grad():
        copied.first.weight.zero_()
        copied.first.bias.zero_()
    assert not copied.first(torch.ones(1, 3)).any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_copied() -> None:
    compiled: Any = torch.compile(Net())
    copied: Any = duplicate(compiled)
    assert copied.first.weight.equal(compiled.first.weight)
