"""Outputs of any structure are compared leaf by leaf, and what is wrong is said in words."""

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Affine, Uniform, apply, measure
from mpq_plugins.adapters.shared.outputs import FLOAT_ROUNDING, output_problem, output_problems
from mpq_plugins.errors import SettingError


class Gives(nn.Module):
    """A model whose output is what a function makes of its input."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


class Changed(Gives):
    """The same, of a changed input."""

    def __init__(self, make: Callable[[Tensor], Any], change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(make)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return super().forward(self.change(x))


X = torch.linspace(1, 2, 12).view(3, 4)
STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (torch.ones(2), x),
    "dict": lambda x: {"logits": x, "none": None},
    "nested": lambda x: OrderedDict(deep=[{"x": (x,)}], text="a", count=3),
}


def fails(_: Tensor) -> Tensor:
    raise RuntimeError("no kernel for it")


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_a_leaf_anywhere_counts(structure: Callable[[Tensor], Any]) -> None:
    reference = Gives(structure)
    assert output_problem(Gives(structure), reference, X, FLOAT_ROUNDING) is None
    changes: list[tuple[Callable[[Tensor], Tensor], str]] = [
        (lambda x: x * 1.01, r"is off by 1\.0% of its norm, and may be by 0\.01%"),
        (lambda x: x.t(), r"has shape \[4, 3\], not \[3, 4\]"),
        (lambda x: x.masked_fill(x > 1.9, torch.nan), "is NaN or infinite where it is not to be"),
        (lambda x: x.masked_fill(x > 1.9, torch.inf), "is NaN or infinite where it is not to be"),
        (fails, r"it does not run: .*RuntimeError: no kernel for it"),
    ]
    for change, said in changes:
        problem = output_problem(Changed(structure, change), reference, X, FLOAT_ROUNDING)
        assert problem is not None
        assert re.search(said, problem), problem


def test_what_rounding_does_and_choices_are_no_difference() -> None:
    assert output_problem(Gives(lambda x: x * (1 + 1e-6)), Gives(lambda x: x), X, FLOAT_ROUNDING) is None
    assert output_problem(Gives(lambda x: (x, x > 1.5)), Gives(lambda x: (x, x > 1.4)), X, FLOAT_ROUNDING) is None
    infinite = Gives(lambda x: x.masked_fill(x > 1.5, -torch.inf))
    assert output_problem(infinite, infinite, X, FLOAT_ROUNDING) is None
    assert output_problem(Gives(torch.zeros_like), Gives(torch.zeros_like), X, FLOAT_ROUNDING) is None
    assert output_problem(Gives(lambda x: (x, x)), Gives(lambda x: x), X, FLOAT_ROUNDING) == "it gives 2 tensors, not 1"


def test_a_batch_that_the_float_model_does_not_take_is_an_error() -> None:
    with pytest.raises(SettingError, match="no kernel for it"):
        output_problem(Gives(lambda x: x), Gives(fails), X, FLOAT_ROUNDING)


def test_the_tolerance_is_that_of_the_plan_and_the_dtype() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    plan = Uniform(bits=8)(measure(model, Affine(granularity="per_channel"), (8,)))
    ours: Any = apply(model, plan)
    assert output_problems(ours, plan, model, X) == []
    assert output_problems(model, plan, model, None) == []
    with torch.no_grad():
        ours[0].weight *= 1.005
        ours[0].bias *= 1.005
    (problem,) = output_problems(ours, plan, model, X)
    assert "on the batch, beside mpq_plugins.apply's, its output is off by 0.5%" in problem
    assert output_problems(ours, plan.with_activation_bits(8), model, X) == []
    assert output_problems(ours, plan, model, X, packed=True) == []
