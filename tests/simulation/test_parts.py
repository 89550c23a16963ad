"""A weight part by part, and which tensors of a checkpoint a plan is about."""

import pytest
import torch

from mpq_plugins import Affine, LayerChoice, Part
from mpq_plugins.simulation.parts import weight_parts
from mpq_plugins.simulation.planned_tensors import PlannedTensors


def choice(shape: tuple[int, ...], axis: int, **bits: object) -> LayerChoice:
    numel = int(torch.empty(shape).numel())
    return LayerChoice(
        name="fc", kind="linear", shape=shape, channel_axis=axis, numel=numel, scheme=Affine(), **bits  # type: ignore[arg-type]
    )  # fmt: skip


PARTS = (Part(bits=2, channels=(0, 3)), Part(bits=16, channels=(2,)), Part(bits=4, channels=(1, 4)))


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_put_back_are_the_weight(axis: int) -> None:
    weight = torch.randn(5, 5, 2, requires_grad=True)
    whole = torch.zeros(5, 5, 2)
    ascending = tuple(sorted(PARTS, key=lambda part: part.bits))
    parts = list(weight_parts(weight, choice((5, 5, 2), axis, parts=ascending)))
    assert [(part.bits, part.channels.tolist(), part.in_float) for part in parts] == [
        (2, [0, 3], False), (4, [1, 4], False), (16, [2], True),
    ]  # fmt: skip
    for part in parts:
        assert part.values.equal(weight.detach().index_select(axis, part.channels))
        part.put(whole, part.values)
    assert whole.equal(weight)


def test_a_layer_of_one_width_is_one_part_which_is_no_copy() -> None:
    weight = torch.randn(4, 6)
    (part,) = weight_parts(weight, choice((4, 6), 0, bits=3))
    assert part.values.data_ptr() == weight.data_ptr()
    assert (part.bits, part.channels.tolist()) == (3, [0, 1, 2, 3])


def test_which_tensors_a_plan_is_about() -> None:
    layer = choice((4, 6), 0, bits=3)
    planned = PlannedTensors({"fc": layer, "experts.w1.0": layer, "experts.w1.2": layer})
    assert planned.layer("fc.weight") == layer
    assert planned.layer("fc.bias") is None
    assert planned.layer("other.weight") is None
    assert planned.has("fc.weight", (4, 6))
    assert not planned.has("fc.bias", (4,))
    stack = torch.arange(72.0).reshape(3, 4, 6)
    assert planned.is_stack("experts.w1", stack.shape)
    assert planned.has("experts.w1", stack.shape)
    assert not planned.is_stack("experts.w1", (3, 4))
    experts = list(planned.experts("experts.w1", stack))
    assert [(name, one) for name, one, _ in experts] == [
        ("experts.w1.0", layer), ("experts.w1.1", None), ("experts.w1.2", layer),
    ]  # fmt: skip
    assert all(matrix.equal(stack[k]) for k, (_, _, matrix) in enumerate(experts))
