"""Which tensors of a checkpoint a plan has something to say about, and which choice is which tensor's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..plans.layers import LayerChoice
from ..plans.names import JOINED, are_experts, is_weight, layer_name, stacks_of


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
        """Whether it stacks the weights of experts that are planned one by one, or has them one below the other."""
        if layer_name(parameter) not in self._stacks:
            return False
        return are_experts(parameter, shape) or self._rows(parameter, shape) > 0

    def has(self, parameter: str, shape: Sequence[int]) -> bool:
        """Whether it is a planned layer's weight, or stacks some."""
        return self.layer(parameter) is not None or self.is_stack(parameter, shape)

    def experts(self, parameter: str, tensor: Tensor) -> Iterator[tuple[str, LayerChoice | None, Tensor]]:
        """The experts of a stack: the name each has as a layer, its choice if it is planned, and its weight."""
        rows = self._rows(parameter, tensor.shape)
        for position, matrix in enumerate(tensor.split(rows) if rows else tensor):
            name = f"{layer_name(parameter)}.{position}"
            yield name, self.choices.get(name), matrix

    def _rows(self, parameter: str, shape: Sequence[int]) -> int:
        """Rows of each expert in a matrix that holds them one below the other, by one that is planned; else 0."""
        if len(shape) != 2 or JOINED.search(parameter) is None:
            return 0
        choices = (choice for name, choice in self.choices.items() if name.rpartition(".")[0] == parameter)
        rows, columns = next((choice.shape for choice in choices if len(choice.shape) == 2), (0, 0))
        return rows if rows and columns == shape[1] and shape[0] % rows == 0 else 0
