"""The quantizable weights of a module, and why its other parameters are left alone."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..checkpoints.readers import MemoryRows
from ..models.folding import folded_weight
from ..models.kinds import layer_kind, output_axis
from .from_checkpoint import Found, dtype_refusal
from .handles import Weight


def module_weights(model: nn.Module, pairs: Mapping[str, str]) -> Found:
    """The layers of a module, each once however often it is used, and what is left alone with its reason."""
    by_identity: dict[int, Weight] = {}
    left_alone: list[tuple[str, str]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        kind = layer_kind(module)
        left_alone += _other_parameters(name, module, kind)
        if kind is None:
            continue
        weight = getattr(module, "weight", None)
        # What is computed is another tensor whenever it is asked for, and ties nothing.
        identity = id(weight) if isinstance(weight, nn.Parameter) else id(module)
        known = by_identity.get(identity)
        if known is not None:
            by_identity[identity] = replace(known, tied=(*known.tied, name))
            continue
        refusal = _refusal(weight)
        if refusal or not isinstance(weight, Tensor):
            by_identity[identity] = _refused(name, kind, output_axis(module), weight, refusal)
            continue
        if name in pairs:
            weight = folded_weight(module, model.get_submodule(pairs[name]))
        by_identity[identity] = _from_tensor(name, kind, output_axis(module), weight.detach())
    return list(by_identity.values()), list(dict.fromkeys(left_alone))


def _refusal(weight: object) -> str:
    if not isinstance(weight, nn.Parameter) or isinstance(weight, nn.UninitializedParameter) or weight.is_meta:
        return (
            "its weight is parametrized, lazy or on the meta device, so there is no stored value to quantize. Remove "
            "the parametrization (mpq_plugins.finish does after prune and share) or materialise the weight first"
        )
    stored = type(weight.data)
    if stored.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"is quantized already, or kept in another form ({stored.__name__}): measure the float model"
    if weight.layout is not torch.strided:
        return f"its weight is kept as {weight.layout}, and only dense weights are quantized: call to_dense() on it"
    return dtype_refusal(weight.dtype)


def _other_parameters(name: str, module: nn.Module, kind: str | None) -> Iterable[tuple[str, str]]:
    for key, buffer in module.named_buffers(recurse=False):
        if buffer.dim() >= 2 and key not in module._non_persistent_buffers_set:
            yield f"{name}.{key}" if name else key, "a buffer"
    for key, parameter in module.named_parameters(recurse=False):
        if isinstance(parameter, nn.UninitializedParameter) or parameter.dim() < 2 or (kind and key == "weight"):
            continue
        reason = f"{type(module).__name__} is no layer kind we quantize" if kind is None else "not the layer's weight"
        yield f"{name}.{key}" if name else key, reason


def _from_tensor(name: str, kind: str, axis: int, weight: Tensor) -> Weight:
    return Weight(name, kind, tuple(weight.shape), weight.dtype, axis, MemoryRows(weight, axis))


def _refused(name: str, kind: str, axis: int, weight: object, refusal: str) -> Weight:
    """A layer that is only named: nothing of its weight is read but its shape, where it has one."""
    nothing = Weight(name, kind, (), torch.float32, axis, MemoryRows(torch.empty(0), axis), refusal=refusal)
    if not isinstance(weight, Tensor) or isinstance(weight, nn.UninitializedParameter):
        return nothing
    return replace(nothing, shape=tuple(weight.shape), dtype=weight.dtype)
