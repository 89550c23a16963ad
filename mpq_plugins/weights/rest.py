"""What a model's file holds beside the weights that are planned: biases, norms, buffers, layers that are skipped."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checkpoints.checkpoint import read_checkpoint, storage_identity
from ..checkpoints.joined import with_stacks
from ..checkpoints.readers import StoredTensor
from ..plans.names import are_experts, is_weight, layer_name, stacks_of, weight_name
from .handles import Weight, Weights


@dataclass(frozen=True)
class _Stored:
    """A tensor as a file would hold it; bytes: None where they are not known. Tensors of one identity are held once."""

    shape: tuple[int, ...]
    bytes: int | None
    identity: object


def rest_bytes(source: nn.Module | str | Path, weights: Weights, key: str | None = None) -> int | None:
    """Bytes of all that a source holds beside these weights, as it is stored; tied tensors count once.

    Of a module that is its state dict, with BatchNorm folded where the weights have it folded in. key: of a torch
    checkpoint, the key of the weights that are meant. Returns None where it is not known what a tensor takes, or a hook
    gives the weights other names than their layers have.
    """
    if isinstance(source, nn.Module):
        stored = _of_module(source, weights)
    else:
        tensors = read_checkpoint(Path(source), key if key is not None else weights.key).tensors
        stored = {name: _in_file(tensor) for name, tensor in with_stacks(tensors).items()}
    return _without(stored, weights)


def _in_file(tensor: StoredTensor) -> _Stored:
    count = math.prod(tensor.shape) * tensor.dtype.itemsize
    taken = tensor.stored_bytes
    if taken is None and not tensor.foreign:
        taken = count
    return _Stored(tuple(tensor.shape), taken, tensor.identity)


def _of_module(model: nn.Module, weights: Weights) -> dict[str, _Stored]:
    norms = frozenset(weights.folding.values())
    stored = {
        name: _in_memory(name, value)
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and name.rpartition(".")[0] not in norms
    }
    return stored | _biases_of_folding(model, weights.folding)


def _in_memory(name: str, tensor: Tensor) -> _Stored:
    """Bytes are None for what has no size yet, or is kept in another form: sparse, nested, of a quantizer's class."""
    plain = type(tensor.data).__torch_dispatch__ is Tensor.__torch_dispatch__
    if is_lazy(tensor) or not plain or tensor.layout is not torch.strided or tensor.is_nested:
        return _Stored((), None, name)
    return _Stored(tuple(tensor.shape), tensor.nbytes, name if tensor.is_meta else storage_identity(name, tensor))


def _biases_of_folding(model: nn.Module, convolutions: Iterable[str]) -> dict[str, _Stored]:
    """The biases that convolutions without one get as BatchNorm is folded into them."""
    added = {}
    for name in convolutions:
        module = model.get_submodule(name)
        if getattr(module, "bias", None) is None:
            channels, weight = module.out_channels, module.weight
            assert isinstance(channels, int)
            assert isinstance(weight, Tensor)
            added[f"{name}.bias"] = _Stored((channels,), channels * weight.dtype.itemsize, f"{name}.bias")
    return added


def _without(stored: Mapping[str, _Stored], weights: Iterable[Weight]) -> int | None:
    """The bytes of what is stored, without those of the weights."""
    planned = {name for weight in weights for name in weight.names}
    stacks = stacks_of(planned)
    if not all(any(_is_there(name, stored, stacks) for name in weight.names) for weight in weights):
        return None
    scales = {weight.scale for weight in weights}
    taken = {tensor.identity for name, tensor in stored.items() if is_weight(name) and layer_name(name) in planned}
    rest = {
        tensor.identity: _beside(name, tensor, planned) if layer_name(name) in stacks else tensor.bytes
        for name, tensor in stored.items()
        if tensor.identity not in taken and name not in scales
    }
    known = [count for count in rest.values() if count is not None]
    return sum(known) if len(known) == len(rest) else None


def _is_there(layer: str, stored: Mapping[str, _Stored], stacks: Iterable[str]) -> bool:
    stack = layer.rpartition(".")[0]
    return weight_name(layer) in stored or (stack in stacks and (stack in stored or weight_name(stack) in stored))


def _beside(name: str, tensor: _Stored, planned: Iterable[str]) -> int | None:
    """Of a stack of experts, the bytes of those that are not planned."""
    if tensor.bytes is None or not are_experts(name, tensor.shape):
        return tensor.bytes
    experts = [f"{layer_name(name)}.{expert}" for expert in range(tensor.shape[0])]
    return tensor.bytes // len(experts) * sum(expert not in planned for expert in experts)
