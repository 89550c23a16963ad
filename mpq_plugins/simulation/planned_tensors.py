"""Which tensors of a checkpoint a plan has something to say about, and which choice is which tensor's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..plans.layers import LayerChoice
from ..plans.names import are_experts, is_weight, layer_name, stacks_of


@dataclass(frozen=True)
class PlannedTensors:
    """The choices of a plan by the names that its layers, tied ones too, have in the checkpoint."""

    choices: Mapping[str, LayerChoice]

    @cached_property
    def _stacks(self) -> frozenset[str]:
        return frozenset(stacks_of(self.choices))

    def layer(self, parameter: str) -> LayerChoice | None:
        """The choice of the layer whose weight this is; None for any other tensor."""
        return self.choices.get(layer_name(parameter)) if is_weight(parameter) else None

    def is_stack(self, parameter: str, shape: Sequence[int]) -> bool:
        """Whether it stacks the weights of experts that are planned one by one."""
        return layer_name(parameter) in self._stacks and are_experts(parameter, shape)

    def has(self, parameter: str, shape: Sequence[int]) -> bool:
        """Whether it is a planned layer's weight, or stacks some."""
        return self.layer(parameter) is not None or self.is_stack(parameter, shape)

    def experts(self, parameter: str, tensor: Tensor) -> Iterator[tuple[str, LayerChoice | None, Tensor]]:
        """The experts of a stack: the name each has as a layer, its choice if it is planned, and its weight."""
        for position, matrix in enumerate(tensor):
            name = f"{layer_name(parameter)}.{position}"
            yield name, self.choices.get(name), matrix
