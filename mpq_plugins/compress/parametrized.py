"""Weights made of something else while a model is trained: torch's parametrizations, put on and taken off."""

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..duplicate import duplicate
from ..errors import SettingError, first_few
from ..weights import Weight

WEIGHT = "weight"


class WeightMaker(nn.Module):
    """What makes a layer's weight here: a mask, or shared values. `finish` takes these off, and no others."""


def put(model: nn.Module, weight: Weight, maker: WeightMaker) -> None:
    """Let `maker` make a layer's weight. Raises SettingError for a weight that other layers share."""
    owners = {id(model.get_submodule(name)) for name in weight.names}
    if len(owners) > 1:
        raise SettingError(
            f"layer {weight.name!r}: its weight is that of {first_few([repr(n) for n in weight.tied], ', ')} too, and "
            "would no longer be. Untie them, or leave the layer out (skip)."
        )
    parametrize.register_parametrization(model.get_submodule(weight.name), WEIGHT, maker)


def finish(model: nn.Module) -> nn.Module:
    """A copy in which every weight that `prune` or `share` made is a plain parameter again, with the values it has."""
    plain = duplicate(model)
    for module in plain.modules():
        if parametrize.is_parametrized(module, WEIGHT) and _is_ours(module):
            _give_own_class(module)
            parametrize.remove_parametrizations(module, WEIGHT, leave_parametrized=True)
    return plain


def _give_own_class(module: nn.Module) -> None:
    """torch gives a parametrized module a class of its own, which copies share: taking the property off one would take
    it off all."""
    shared = type(module)
    inner = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, inner)


def _is_ours(module: nn.Module) -> bool:
    makers = module.parametrizations[WEIGHT]  # type: ignore[index]
    return all(isinstance(maker, WeightMaker) for maker in makers)


class Mask(WeightMaker):
    """The weight where the mask is true, and 0 elsewhere, whatever an optimizer does to it."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, pruned."""
        return weight.where(self.mask, 0)
