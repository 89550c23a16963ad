"""Weights made of something else while a model is trained: torch's parametrizations, put on and taken off."""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..common.text import first_few
from ..errors import SettingError
from ..models.arguments import check_module
from ..models.copying import duplicate
from ..weights.handles import Weight

WEIGHT = "weight"


class WeightMaker(nn.Module):
    """What makes a layer's weight here: a mask, or shared values. `finish` takes these off, and no others.

    order: of the layer's parameters before, for whoever goes by position, as optimizers do.
    """

    order: tuple[str, ...] = ()


def put(model: nn.Module, weight: Weight, maker: WeightMaker) -> None:
    """Let `maker` make a layer's weight. Raises SettingError for a weight that other layers share."""
    owners = {id(model.get_submodule(name)) for name in weight.names}
    if len(owners) > 1:
        raise SettingError(
            f"layer {weight.name!r}: its weight is that of {first_few([repr(n) for n in weight.tied], ', ')} too, and "
            "would no longer be. Untie them, or leave the layer out (skip)."
        )
    module = model.get_submodule(weight.name)
    maker.order = tuple(module._parameters)
    if parametrize.is_parametrized(module):
        _give_own_class(module)
    parametrize.register_parametrization(module, WEIGHT, maker)


def finish(model: nn.Module) -> nn.Module:
    """Make a copy in which what `prune` or `share` made are plain parameters again, with the values they have.

    Args:
        model: What `prune` or `share` returned, trained or not; it is not changed.

    Returns:
        The copy, without masks and centroids.

    Raises:
        SettingError: Something else has been put on such a weight since.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> masked = mpq.prune(torch.nn.Sequential(torch.nn.Linear(8, 8)), mpq.Sparsity(0.5))
        >>> int((mpq.finish(masked)[0].weight == 0).sum())
        32
    """
    check_module(model)
    plain = duplicate(model)
    for name, module in plain.named_modules():
        makers = _makers(module)
        if not any(isinstance(maker, WeightMaker) for maker in makers):
            continue
        if len(makers) > 1:
            raise SettingError(
                f"layer {name!r}: its weight has another parametrization beside what prune() or share() put on; remove "
                "that first"
            )
        order = makers[0].order
        _give_own_class(module)
        parametrize.remove_parametrizations(module, WEIGHT, leave_parametrized=True)
        module._parameters = {key: module._parameters[key] for key in order}
    return plain


def _give_own_class(module: nn.Module) -> None:
    """torch gives a parametrized module a class of its own, which copies share: taking the property off one would take
    it off all."""
    shared = type(module)
    inner = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, inner)


def _makers(module: nn.Module) -> list[Any]:
    """The parametrizations of its weight."""
    if not parametrize.is_parametrized(module, WEIGHT):
        return []
    return list(module.parametrizations[WEIGHT])  # type: ignore[index]


class Mask(WeightMaker):
    """The weight where the mask is true, and 0 elsewhere, whatever an optimizer does to it."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, pruned."""
        return weight.where(self.mask, 0)
