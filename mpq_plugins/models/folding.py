"""Folding BatchNorm into the convolution before it, the way backends do before they quantize.

    y = gamma (W x - mu) / sqrt(var + eps) + beta  =  (gamma / sqrt(var + eps)) W x + beta'

Only layers and norms that compute as torch's own (plain.py) are folded, and norms that normalise by stored statistics.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import type_before_parametrizations

from ..common.text import first_few
from ..errors import SettingError, SourceError
from .borrowed import borrowed_in_source
from .copying import duplicate
from .plain import is_plain, standard_class
from .tracing import BATCH_NORMS, CONVOLUTIONS, TRAINING, TRANSPOSED, Traced, memory


class Measured(Protocol):
    """What says whether BatchNorm was folded in when its layers were measured: a LayerTable or a Plan."""

    @property
    def fold_bn(self) -> bool:
        """Whether it was."""
        ...

    @property
    def skipped(self) -> tuple[str, ...]:
        """Layers left alone on request."""
        ...


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any module is a BatchNorm."""
    return any(isinstance(module, BATCH_NORMS) for module in model.modules())


@dataclass(frozen=True)
class Folded:
    """A copy of a model in which every foldable BatchNorm is folded and an Identity; layers have the same names.

    pairs: convolution -> the BatchNorm that was folded into it; traced: the model as it was.
    """

    model: nn.Module
    pairs: Mapping[str, str]
    traced: Traced

    @classmethod
    def of(cls, model: nn.Module | Traced, skip: Collection[str] = ()) -> "Folded":
        """Fold a copy. skip: convolutions that keep their BatchNorm. Raises as fold_batch_norm."""
        traced = Traced.of(model)
        copied = duplicate(traced.model)
        pairs = conv_bn_pairs(traced, skip)
        _fold_pairs(copied, pairs)
        return cls(copied, pairs, traced)


def conv_bn_pairs(model: nn.Module | Traced, skip: Collection[str] = ()) -> dict[str, str]:
    """Convolution name -> the BatchNorm that alone consumes its output and can be folded into it.

    A convolution with several consumers or a shared weight, either module when called more than once, computing in its
    own way or lending a parameter to a functional call, a BatchNorm that normalises by its batch, and a skipped
    convolution stay unfolded: the result would be another function. Raises SourceError where torch.fx cannot trace the
    model.
    """
    traced = Traced.of(model)
    if not has_batch_norm(traced.model):
        return {}
    return {conv: norm for conv, norm in _pairs(traced, skip).items() if not _trains(traced.model, norm)}


def unfolded_norms(model: nn.Module | Traced) -> dict[str, str]:
    """Convolution or linear layer -> a BatchNorm that it feeds and that is not folded into it.

    Backends that fold by themselves, by torch's exact classes, parametrized or not, take them for a pair all the same.
    Raises SourceError as conv_bn_pairs.
    """
    traced = Traced.of(model)
    if not has_batch_norm(traced.model):
        return {}
    pairs = conv_bn_pairs(traced)
    calls = _fed_norms(traced.graph, traced.model, (nn.Linear, *CONVOLUTIONS))
    fed = [(str(layer.target), str(norm.target)) for layer, norm in calls]
    return {layer: norm for layer, norm in fed if pairs.get(layer) != norm and _is_torchs(traced.model, layer)}


def borrowed_weights(model: nn.Module | Traced) -> set[str]:
    """Names of parameters that functional calls use, as torch.fx sees it; where it cannot trace, as the code says."""
    traced = Traced.of(model)
    try:
        return traced.lent
    except SourceError:
        return borrowed_in_source(traced.model)


def training_norms(model: nn.Module) -> list[str]:
    """BatchNorms that normalise by their batch although they have statistics: those in training mode."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS) and module.training and module.running_mean is not None
    ]


def folded_copy(model: nn.Module | Traced, measured: Measured) -> nn.Module:
    """A copy of the model as it was when a table or plan was measured: with BatchNorm folded into its layers, or not.

    Raises SettingError for a model that cannot be copied, or whose BatchNorms, folded then, are in training mode now.
    """
    traced = Traced.of(model)
    if not measured.fold_bn:
        return duplicate(traced.model)
    trained = _only_for_training(traced, measured.skipped)
    if trained:
        raise SettingError(
            f"{type(traced.model).__name__}: BatchNorm was folded in when its layers were measured, and is in training "
            f"mode now ({first_few([repr(name) for name in trained], ', ')}), where it normalises by its batch; call "
            "model.eval()"
        )
    return fold_batch_norm(traced, measured.skipped)


def fold_batch_norm(model: nn.Module | Traced, skip: Collection[str] = ()) -> nn.Module:
    """A copy of the model with every foldable BatchNorm folded and replaced by Identity; same layer names.

    skip: convolutions that keep their BatchNorm. Raises SettingError for a model that cannot be copied, SourceError
    where torch.fx cannot trace it.
    """
    return Folded.of(model, skip).model


def fold_in_place(model: nn.Module, skip: Collection[str] = ()) -> None:
    """Fold the model itself. Raises SourceError where torch.fx cannot trace it."""
    _fold_pairs(model, conv_bn_pairs(model, skip))


def _fold_pairs(model: nn.Module, pairs: Mapping[str, str]) -> None:
    for conv_name, norm_name in pairs.items():
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        conv.weight, conv.bias = _fold(conv, norm)
        _make_identity(norm)


def _make_identity(norm: nn.Module) -> None:
    """The norm itself becomes an Identity, for it may be held in a list or an attribute besides its names."""
    norm.__class__ = nn.Identity
    norm._parameters.clear()
    norm._buffers.clear()


def folded_weight(conv: nn.Module, norm: nn.Module) -> Tensor:
    """The convolution's weight with the BatchNorm's scale in it."""
    return _fold(conv, norm)[0].detach()


def folding_factor(norm: nn.Module) -> Tensor:
    """What folding a BatchNorm multiplies each output channel of the weight before it by, (channels,)."""
    assert isinstance(norm, BATCH_NORMS)
    assert norm.running_var is not None
    with torch.no_grad():
        inverse = torch.rsqrt(norm.running_var + norm.eps)
        return inverse if norm.weight is None else norm.weight.detach() * inverse


def _is_torchs(model: nn.Module, layer: str) -> bool:
    module = model.get_submodule(layer)
    return type_before_parametrizations(module) is standard_class(module)


def _pairs(traced: Traced, skip: Collection[str]) -> dict[str, str]:
    """What can be folded once the model is in evaluation mode."""
    graph, model = traced.graph, traced.model
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    weights = Counter(memory(weight) for weight in {id(p): p for p in model.parameters()}.values())
    shared = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    skipped = {id(modules[name]) for name in skip if name in modules}

    def alone(conv: nn.Module, norm: nn.Module) -> bool:
        weight = conv.weight
        assert isinstance(weight, Tensor)
        return calls[id(conv)] == calls[id(norm)] == shared[id(weight)] == weights[memory(weight)] == 1

    candidates = {}
    for layer, call in _fed_norms(graph, model, CONVOLUTIONS):
        conv, norm = modules[str(layer.target)], modules[str(call.target)]
        stays = call.meta[TRAINING] == norm.training  # the model's forward may change its mode
        if len(layer.users) == 1 and id(conv) not in skipped and stays and _can_fold(conv, norm) and alone(conv, norm):
            candidates[str(layer.target)] = str(call.target)
    if not candidates:
        return {}
    lenders = {id(modules[name.rpartition(".")[0]]) for name in traced.lent}
    return {c: n for c, n in candidates.items() if not lenders & {id(modules[c]), id(modules[n])}}


def _fed_norms(
    graph: torch.fx.Graph, model: nn.Module, kinds: tuple[type[nn.Module], ...]
) -> list[tuple[torch.fx.Node, torch.fx.Node]]:
    """Calls of layers of these kinds, and of the BatchNorms that take what they give."""
    modules = dict(model.named_modules(remove_duplicate=False))
    pairs = [(module_input(node), node) for node in graph.nodes]
    return [
        (layer, norm)
        for layer, norm in pairs
        if isinstance(layer, torch.fx.Node) and layer.op == "call_module"
        and isinstance(modules[str(layer.target)], kinds) and isinstance(modules[str(norm.target)], BATCH_NORMS)
    ]  # fmt: skip


def module_input(node: torch.fx.Node) -> object:
    """What a module is called on, by position or by name; None for other nodes."""
    if node.op != "call_module":
        return None
    return node.args[0] if node.args else node.kwargs.get("input")


def _trains(model: nn.Module, norm: str) -> bool:
    return model.get_submodule(norm).training


def _only_for_training(traced: Traced, skip: Collection[str]) -> list[str]:
    """Of a model in training mode: the BatchNorms that this alone keeps from being folded, where it is all of them.

    A norm that stays in training mode within a model in evaluation mode does so on purpose.
    """
    model = traced.model
    if not model.training or not training_norms(model):
        return []
    norms = _pairs(traced, skip).values()
    return [] if any(not _trains(model, norm) for norm in norms) else list(norms)


def _can_fold(conv: nn.Module, norm: nn.Module) -> bool:
    if isinstance(conv, TRANSPOSED) and conv.groups > 1:
        return False  # torch's fusion does not know how their channels are spread over groups
    return is_plain(conv) and is_plain(norm) and norm.running_mean is not None and norm.running_var is not None


def _fold(conv: nn.Module, norm: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    assert isinstance(conv, CONVOLUTIONS)
    assert isinstance(norm, BATCH_NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():  # weights made in inference mode cannot be kept for a gradient
        return fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias,
            transpose=isinstance(conv, TRANSPOSED),
        )  # fmt: skip
