"""What one call of a layer adds to the sums that decide its rounding: a unit of work.

Calls need nothing of each other. Layers do: each is rounded on the inputs that those before it give, quantized. So it
is batches that workers share.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..models.autocast import own_arithmetic
from ..models.units import Job, Unit
from ..simulation.shifts import shortening, usual_vectors
from .columns import Columns, Piece
from .gram import PIECE, Product, products
from .settings import MEMORY, Outliers

PADDING = ("padding", "padding_mode", "_reversed_padding_repeated_twice", "output_padding")  # of a convolution


@dataclass(frozen=True)
class Given:
    """One call of a layer: its input in the quantized net, and what the float net's layer gives, None if it has not.

    lost: what the shortcut lost, as it counts at the layer's output; None without one.
    """

    rough: Tensor
    exact: Tensor | None
    lost: Tensor | None


@dataclass(frozen=True)
class CallLook:
    """A call to be looked at.

    geometry, settings: of the layer, which itself has hooks on it; drawn: a few samples at a time, with the positions
    of each; outliers: as in `compensate`.
    """

    layer: str
    geometry: Columns
    settings: Any
    weight: Tensor
    call: Given
    drawn: Sequence[tuple[Piece, Tensor]]
    outliers: Outliers

    @classmethod
    def of(
        cls, layer: str, module: Any, weight: Tensor, call: Given, drawn: Sequence[tuple[Piece, Tensor]],
        outliers: Outliers = "leave_out",
    ) -> "CallLook":  # fmt: skip
        """What a worker needs of a layer and a call."""
        known = {name: getattr(module, name) for name in PADDING if hasattr(module, name)}
        bias = None if module.bias is None else module.bias.detach()
        return cls(layer, Columns.of(module), SimpleNamespace(bias=bias, **known), weight, call, drawn, outliers)

    def parts(self) -> Iterator["Part"]:
        """What is summed, a few samples at a time."""
        geometry, call = self.geometry, self.call
        matrices = geometry.matrices(self.weight)
        bias = 0.0 if self.settings.bias is None else self.settings.bias.reshape(geometry.groups, -1)
        tokens = geometry.takes_tokens(call.rough)
        shape = (geometry.samples(call.rough), geometry.positions(self.settings, call.rough))
        for piece, at in self.drawn:
            columns = geometry.columns(self.settings, piece.of(call.rough), at).float()
            with own_arithmetic():
                own = torch.einsum("ngd,grd->ngr", columns, matrices)
            exact = None
            if call.exact is not None and geometry.outputs(call.exact) == shape:
                exact = geometry.values(piece.of(call.exact), at).float()
            if tokens:
                outputs = (own if exact is None else exact).flatten(1)
                if self.outliers == "leave_out":
                    columns = columns[usual_vectors(outputs)]
                else:
                    columns = columns * shortening(outputs)[:, None, None]
                yield Part(products(columns, None))
            elif exact is None:
                yield Part(products(columns, None))
            else:
                wanted = exact - bias
                lacking, varying = _variation(wanted - own), _variation(exact)
                if call.lost is not None:
                    wanted = wanted + geometry.values(piece.of(call.lost), at)
                yield Part(products(columns, wanted - own), lacking, varying)


@dataclass(frozen=True)
class Part:
    """What is to be summed. lacking, varying: squares of what float weights miss of the target, and of the target."""

    products: Iterator[Product] | Sequence[Product]
    lacking: float = 0.0
    varying: float = 0.0


def by_call(looks: Sequence[CallLook], side: int, executor: Executor | None) -> Iterator[Part]:
    """The parts of all calls, in their order. side: values of a product.

    Products that would not all fit into memory are made here, one at a time.
    """
    pieces = sum(-(-at.numel() // PIECE) for look in looks for _, at in look.drawn)
    if executor is None or len(looks) < 2 or 4 * side * pieces > MEMORY:
        for look in looks:
            yield from look.parts()
        return
    units = [Unit(str(n), look.layer, (look,)) for n, look in enumerate(looks)]
    found: dict[int, list[Part]] = {}
    next_one = 0
    for unit, parts in Job(call_parts, {}, "rounding").results(units, executor):
        found[int(unit.name)] = parts
        while next_one in found:
            yield from found.pop(next_one)
            next_one += 1


def call_parts(look: CallLook) -> list[Part]:
    """What a worker does."""
    with torch.no_grad():
        return [Part(list(part.products), part.lacking, part.varying) for part in look.parts()]


def _variation(values: Tensor) -> float:
    """The sum of squares about the mean of each channel."""
    return float((values - values.mean(0)).square().sum())
