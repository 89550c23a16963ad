"""The float net and the quantized net side by side, on one device, and the order in which units are reconstructed."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import SettingError
from ..models.folding import folded_copy
from ..models.input_ranges import quantize_input
from ..models.kinds import quantizable_weights
from ..models.running import evaluating
from ..plans.plan import Plan
from ..simulation.correct import correct
from .adaround import nearest, require_affine
from .blocks import find_units, in_call_order, learned_layers
from .capture import call_order
from .settings import Settings


@dataclass(frozen=True)
class Nets:
    """exact: the float net; rough: the quantized one, whose units become quantized one after another.

    weights: the float weights that rounding begins at, by layer; units: layers by unit, in the order of calls; calls:
    how often each batch calls each unit.
    """

    exact: nn.Module
    rough: nn.Module
    plan: Plan
    weights: Mapping[str, Tensor]
    units: Mapping[str, tuple[str, ...]]
    calls: Sequence[Mapping[str, int]]
    device: torch.device
    buffers: Mapping[nn.Module, Mapping[str, Tensor]]

    @classmethod
    def of(
        cls, model: nn.Module, plan: Plan, batches: Sequence[Any], settings: Settings, device: torch.device
    ) -> "Nets":
        """Copies of the model. Raises SettingError for blocks that cannot be found or captured."""
        exact = folded_copy(model, plan)
        rough = correct(model, plan, batches) if settings.correct else copy.deepcopy(exact)
        for net in (exact, rough):
            net.to(device).requires_grad_(False)
        layers = learned_layers(rough, plan)
        units = find_units(rough, list(layers), settings.blocks)
        weights = {name: module.weight.detach().clone() for name, module in layers.items()}  # type: ignore[operator]
        for name, weight in weights.items():
            require_affine(weight, plan.by_any_name[name])
        buffers = {net: {name: buffer.clone() for name, buffer in net.named_buffers()} for net in (exact, rough)}
        if not units:
            raise SettingError("plan: no layer of it has a rounding to learn")
        with evaluating(exact):
            calls = [call_order(exact, list(units), on_device(batch, device)) for batch in batches]
        order = in_call_order(units, list(dict.fromkeys(name for counts in calls for name in counts)))
        _quantize_the_rest(rough, plan, weights)
        return cls(exact, rough, plan, weights, {name: units[name] for name in order}, calls, device, buffers)

    def restore_buffers(self) -> None:
        """As they were: a forward may count calls, or average what it sees, and runs are not part of the result."""
        for net, known in self.buffers.items():
            buffers = dict(net.named_buffers())
            for name, buffer in known.items():
                buffers[name].copy_(buffer)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Set parameters and buffers of the quantized net, by any of their full names."""
        net = self.rough
        stored = dict([*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)])
        with torch.no_grad():
            for name, tensor in tensors.items():
                stored[name].copy_(tensor)

    def vectors_of(self, unit: str) -> dict[str, Tensor]:
        """Copies to learn of the unit's biases and norms, by their names in it, but for what others share."""
        prefix = f"{unit}." if unit else ""
        every = list(self.rough.named_parameters(remove_duplicate=False))
        shared = {id(parameter) for name, parameter in every if not name.startswith(prefix)}
        return {
            name.removeprefix(prefix): parameter.detach().clone().requires_grad_()
            for name, parameter in every
            if name.startswith(prefix) and id(parameter) not in shared
            and parameter.dim() == 1 and parameter.is_floating_point()
        }  # fmt: skip

    def quantize_inputs(self, unit: str) -> None:
        """Give the unit's layers input quantizers, where the plan has bits for activations."""
        for layer in self.units[unit]:
            activations = self.plan.by_any_name[layer].activations
            if activations is not None:
                quantize_input(
                    self.rough.get_submodule(layer), activations.bits, activations.dynamic,
                    symmetric=activations.symmetric,
                )  # fmt: skip


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch, its tensors on a device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is, going by its first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def as_the_models(model: nn.Module, net: nn.Module) -> None:
    """Let the net's parameters take gradients as the model's do; a bias may be new."""
    known = dict(model.named_parameters())
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(known[name].requires_grad if name in known else bool(known))


def _quantize_the_rest(model: nn.Module, plan: Plan, learned: Mapping[str, Tensor]) -> None:
    """Embeddings, and layers that share their weights, as the plan has them: rounded to nearest."""
    with torch.no_grad():
        for name, weight in quantizable_weights(model).items():
            if name in plan.by_any_name and name not in learned:
                weight.copy_(nearest(weight.cpu(), plan.by_any_name[name]))
