"""Trained quantization: the centroids of shared weights as parameters.

    dL / dc_k = sum over the weights w_ij of cluster k of dL / dw_ij            (arXiv 1510.00149, sec. 3.3, eq. 3)

which is what differentiating w_ij = c[code_ij] gives.
"""

import torch
from torch import Tensor, nn

from ..checkpoints.rows import channel_rows, from_channel_rows
from ..errors import SettingError
from ..models.arguments import check_module
from ..plans.arguments import check_plan
from ..plans.granular import FLOAT_BITS
from ..plans.layers import LayerChoice
from ..plans.plan import Plan
from ..quantization.codebook import quantize
from ..simulation.match import match
from ..simulation.model import float_copy
from ..simulation.parts import weight_parts
from ..weights.find import find_weights
from .parametrized import WeightMaker, put


class SharedWeight(WeightMaker):
    """A weight by its centroids (k,), those of all groups one after the other; what is 0 stays 0."""

    index: Tensor
    pruned: Tensor

    def __init__(self, centroids: Tensor, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index.int())
        self.register_buffer("pruned", centroids == 0)
        self._first: Tensor | None = centroids.clone()

    def forward(self, centroids: Tensor) -> Tensor:
        """The weight, in its own shape."""
        free = centroids.masked_fill(self.pruned, 0)
        # Gradients of a million weights add up to one of a centroid, which half precision could not hold.
        wide = free.float() if free.dtype.itemsize < 4 else free
        return wide.index_select(0, self.index.reshape(-1)).to(free.dtype).reshape(self.index.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The centroids that training begins at. Raises SettingError where somebody assigns another weight later."""
        if self._first is None:
            raise SettingError("a shared weight is made of its centroids, and cannot be assigned; finish() first")
        first, self._first = self._first, None
        return first


def share(model: nn.Module, plan: Plan) -> nn.Module:
    """Make a copy whose planned weights are shared as `apply` shares them, and whose centroids are what is trained.

    Every planned layer's parameter is its centroids; all else is trained as before. `finish` makes plain weights of
    them, in which the plan finds the trained centroids.

    Args:
        model: The model; it is not changed.
        plan: A plan under a codebook scheme.

    Returns:
        The copy.

    Raises:
        MismatchError: The plan was made for another model.
        SettingError: A layer is under another scheme, partly in floating point, or has a tied weight.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> shared = mpq.share(net, mpq.Uniform(bits=2)(mpq.measure(net, mpq.Codebook(), bits=[2])))
        >>> shared[0].weight.unique().numel()
        4
    """
    check_module(model)
    check_plan(plan)
    match(plan, model).require(type(model).__name__)
    shared = float_copy(model, plan)
    for weight in find_weights(shared, refuse=False):
        choice = next((plan.by_any_name[name] for name in weight.names if name in plan.by_any_name), None)
        if choice is not None and not choice.in_float:
            values = shared.get_submodule(weight.name).weight
            assert isinstance(values, Tensor)
            put(shared, weight, _shared(values.detach(), choice))
    return shared


def _shared(weight: Tensor, choice: LayerChoice) -> SharedWeight:
    scheme, axis = choice.scheme.as_codebook, choice.channel_axis
    if scheme is None or any(part.bits in FLOAT_BITS for part in choice.all_parts):
        shared = scheme is not None
        problem = "is partly in floating point" if shared else f"is planned {choice.scheme}"
        remedy = "Give all of it bits" if shared else "Measure under Codebook()"
        raise SettingError(
            f"layer {choice.name!r}: {problem}, and only codebooks have centroids to train. {remedy}, or leave the "
            "layer out (skip)."
        )
    index = torch.zeros(weight.shape, dtype=torch.int32, device=weight.device)
    books: list[Tensor] = []
    known = 0
    for part in weight_parts(weight, choice):
        quantized = quantize(part.values, part.bits, scheme, channel_axis=axis, layer=choice.name)
        groups, entries = quantized.centroids.shape
        rows = channel_rows(quantized.codes.int(), axis)
        if rows.numel():
            first = known + entries * torch.arange(groups, dtype=torch.int32, device=weight.device)
            rows = (rows.reshape(groups, -1) + first[:, None]).reshape(rows.shape)
        part.put(index, from_channel_rows(rows, quantized.codes.shape, axis))
        books.append(quantized.centroids.reshape(-1))
        known += groups * entries
    return SharedWeight(torch.cat(books).to(weight), index)
