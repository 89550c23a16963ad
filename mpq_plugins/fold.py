"""Folding BatchNorm into the convolution before it, through torch's own fusion utilities."""

from collections import Counter
from collections.abc import Callable
from threading import Lock, get_ident
from typing import Any

import torch.fx
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .duplicate import duplicate
from .errors import SourceError, what_it_said

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# While it traces, torch.fx replaces nn.Module.__call__ for the whole process: one trace at a time.
_TRACING = Lock()

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _Tracer(torch.fx.Tracer):
    """Takes a user's own subclass of a layer or BatchNorm for what it is, not for code to look into.

    torch.fx patches nn.Module for the whole process while it traces; other threads get what they would without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.thread = get_ident()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaves = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *BATCH_NORMS)
        return isinstance(m, leaves) or super().is_leaf_module(m, module_qualified_name)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any module is a BatchNorm."""
    return any(isinstance(module, BATCH_NORMS) for module in model.modules())


def conv_bn_pairs(model: nn.Module) -> dict[str, str]:
    """Convolution name -> the BatchNorm that alone consumes its output.

    A convolution with several consumers or a shared weight, and either module when called more than once, stays
    unfolded: the result would be another function. Raises SourceError where torch.fx cannot trace the model.
    """
    if not has_batch_norm(model):
        return {}
    return _pairs(_trace(model), model)


def unfolded_norms(model: nn.Module) -> dict[str, str]:
    """Convolution or linear layer -> a BatchNorm that it feeds and that is not folded into it.

    Backends that fold by themselves take them for a pair all the same. Raises SourceError as conv_bn_pairs.
    """
    if not has_batch_norm(model):
        return {}
    graph = _trace(model)
    pairs, modules = _pairs(graph, model), dict(model.named_modules(remove_duplicate=False))
    found: dict[str, str] = {}
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, torch.fx.Node) or source.op != "call_module":
            continue
        layer, norm = str(source.target), str(node.target)
        feeds = isinstance(modules[layer], (nn.Linear, *CONVOLUTIONS)) and isinstance(modules[norm], BATCH_NORMS)
        if feeds and pairs.get(layer) != norm:
            found[layer] = norm
    return found


def borrowed_weights(model: nn.Module) -> set[str]:
    """Names of the layers' parameters that functional calls use, as far as torch.fx can see; none where it cannot."""
    try:
        graph = _trace(model)
    except SourceError:
        return set()
    return {str(node.target) for node in graph.nodes if node.op == "get_attr"}


def _pairs(graph: torch.fx.Graph, model: nn.Module) -> dict[str, str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    sharers = Counter(id(module.weight) for module in model.modules() if isinstance(module, CONVOLUTIONS))
    pairs: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not node.args:
            continue
        source = node.args[0]
        if not isinstance(source, torch.fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        conv, norm = modules[str(source.target)], modules[str(node.target)]
        if not isinstance(conv, CONVOLUTIONS) or not isinstance(norm, BATCH_NORMS):
            continue
        if isinstance(conv, TRANSPOSED) and conv.groups > 1:
            continue  # torch's fusion does not know how their channels are spread over groups
        if sharers[id(conv.weight)] > 1:
            continue
        if is_plain(norm) and calls[id(conv)] == 1 and calls[id(norm)] == 1 and norm.running_mean is not None:
            pairs[str(source.target)] = str(node.target)
    return pairs


def is_plain(norm: nn.Module) -> bool:
    """Whether a BatchNorm's forward is torch's own; a subclass with its own does more than normalise."""
    return any(type(norm).forward is kind.forward for kind in BATCH_NORMS)


def _trace(model: nn.Module) -> torch.fx.Graph:
    try:
        with _TRACING:
            return _Tracer().trace(model)
    except Exception as error:  # a user's forward may raise anything while being traced
        raise SourceError(
            f"{type(model).__name__}: cannot be traced to find which BatchNorm follows which convolution "
            f"({what_it_said(error)}). "
            "Measure with fold_bn=False, or per_channel, where folding changes no code."
        ) from error


def folded_weight(conv: nn.Module, norm: nn.Module) -> Tensor:
    """The convolution's weight with the BatchNorm's scale in it."""
    return _fold(conv, norm)[0].detach()


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of the model with every foldable BatchNorm folded and replaced by Identity; same layer names."""
    model = duplicate(model)
    fold_in_place(model)
    return model


def fold_in_place(model: nn.Module) -> None:
    """Fold the model itself. Raises SourceError where torch.fx cannot trace it."""
    for conv_name, norm_name in conv_bn_pairs(model).items():
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        conv.weight, conv.bias = _fold(conv, norm)
        for alias in [name for name, module in model.named_modules(remove_duplicate=False) if module is norm]:
            parent, _, own = alias.rpartition(".")
            setattr(model.get_submodule(parent), own, nn.Identity().train(norm.training))


def _fold(conv: nn.Module, norm: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    assert isinstance(conv, CONVOLUTIONS)
    assert isinstance(norm, BATCH_NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias,
        transpose=isinstance(conv, TRANSPOSED),
    )  # fmt: skip
