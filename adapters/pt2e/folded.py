"""What PT2E has folded into an exported graph, read from the graph: norms that torch.fx does not show are there too."""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from mpq_plugins.checkpoints.rows import channel_rows
from mpq_plugins.common.text import what_it_said
from mpq_plugins.errors import SourceError
from mpq_plugins.models.copying import duplicate
from mpq_plugins.models.folding import Folded, unfolded_norms
from mpq_plugins.models.kinds import layer_kind, output_axis, quantizable_weights
from mpq_plugins.models.running import evaluating
from mpq_plugins.models.tracing import BATCH_NORMS, Traced, opened_trace
from mpq_plugins.plans.names import weight_name
from mpq_plugins.plans.plan import Plan

from ..shared.folded import has_float16, round_after, rounded_before
from ..shared.outputs import difference

WEIGHTED = (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
CLOSE = 1e-5
"""How far the weights of a graph may be from the model's, of the largest: what folding rounds."""
ROUNDING = 1e-3
"""What that may come to over a deep network, of the outputs' norm; a norm folded wrongly comes to far more."""


def attribute(graph: torch.fx.GraphModule, target: str) -> Tensor:
    """The tensor under a name."""
    parent, _, last = target.rpartition(".")
    return cast(Tensor, getattr(graph.get_submodule(parent), last))


def weight_names(model: nn.Module) -> dict[str, str]:
    """The names of all layers' weights as parameters -> the first name of a layer that has it."""
    first: dict[int, str] = {}
    names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if layer_kind(module) is not None:
            names[weight_name(name)] = first.setdefault(id(module.weight), name)
    return names


def folding_factors(graph: torch.fx.GraphModule, model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Which layers' weights were multiplied in the graph, by what each output channel, (channels,); which are others.

    Layers whose weights are the model's, but for what folding rounds, are in neither.
    """
    factors: dict[str, Tensor] = {}
    strange: list[str] = []
    names = weight_names(model)
    for node in graph.graph.nodes:
        name = names.get(str(node.target)) if node.op == "get_attr" else None
        if name is None or not node.users:
            continue
        layer = model.get_submodule(name)
        weight, float_weight = attribute(graph, str(node.target)), cast(Tensor, layer.weight)
        if weight.shape != float_weight.shape:
            strange.append(name)
        elif not _close(weight, float_weight):
            axis = output_axis(layer)
            factor = _factor(weight, float_weight, axis)
            if _close(weight, times(float_weight, factor, axis)):
                factors[name] = factor
            else:
                strange.append(name)
    return factors, strange


def times(weight: Tensor, factor: Tensor, axis: int) -> Tensor:
    """The weight with each output channel multiplied by its factor, (channels,)."""
    return weight.detach() * factor.reshape([-1 if dimension == axis else 1 for dimension in range(weight.dim())])


def computed_weights(model: nn.Module) -> list[str]:
    """Layers that work before a norm with a weight that is no parameter, as far as torch.fx sees it.

    PT2E, which goes by operators, fails to fold the norm into what is computed, or is a buffer or a plain tensor.
    """
    by_part = ((prefix, _computed_weights(part, graph)) for prefix, part, graph in traceable_parts(model))
    return [f"{prefix}{name}" for prefix, names in by_part for name in names]


def wrong_pairs(model: nn.Module) -> dict[str, str]:
    """As `fold.unfolded_norms`, of the parts of a model that torch.fx can trace."""
    by_part = ((prefix, unfolded_norms(part)) for prefix, part, _ in traceable_parts(model))
    return {f"{prefix}{layer}": f"{prefix}{norm}" for prefix, pairs in by_part for layer, norm in pairs.items()}


def traceable_parts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, torch.fx.Graph]]:
    """The largest modules of a model that torch.fx can trace, after what their layers' names begin with; their graphs.

    Layers that compute in their own way are looked into.
    """
    try:
        graph = opened_trace(model)
    except SourceError:
        for name, child in model.named_children():
            yield from traceable_parts(child, f"{prefix}{name}.")
    else:
        yield prefix, model, graph


def _computed_weights(model: nn.Module, graph: torch.fx.Graph) -> list[str]:
    norms = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, BATCH_NORMS)}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    layers = []
    for node in graph.nodes:
        is_norm = node.target is F.batch_norm or (node.op == "call_module" and node.target in norms)
        source = node.all_input_nodes[0] if is_norm and node.all_input_nodes else None
        if source is not None and source.target in WEIGHTED:
            weight = source.args[1] if len(source.args) > 1 else source.kwargs.get("weight")
            if not (isinstance(weight, torch.fx.Node) and weight.op == "get_attr" and weight.target in parameters):
                stack = source.meta.get("nn_module_stack", {})  # none where the model's own forward does it
                layers.append(str(next(reversed(stack.values()), ("",))[0]))
    return layers


def graph_problem(graph: torch.fx.GraphModule, model: nn.Module) -> str | None:
    """Whether a graph, made for inputs of certain shapes, computes what the model does on such; in words, if not."""
    copied = duplicate(model)
    try:
        args, kwargs = _example(graph)
        with torch.no_grad(), evaluating(copied):
            problem = difference(graph(*args, **kwargs), copied(*args, **kwargs), ROUNDING)
    except Exception as error:  # noqa: BLE001  # a user's forward may raise anything on inputs that were made up
        return (
            "torch.fx cannot tell what PT2E folds there, and the model does not run on inputs made up to find out "
            f"({what_it_said(error)}): use mpq_plugins.apply or the torchao adapter, which do not fold"
        )
    return problem and (
        f"PT2E has folded a norm where that makes another function (beside the model's, {problem}): give each "
        "convolution its own norm, or use mpq_plugins.apply or the torchao adapter, which do not fold"
    )


def traced_fold(traced: Traced) -> Folded:
    """A copy with BatchNorm folded in as torch.fx sees it; the model itself where it sees nothing."""
    try:
        return Folded.of(traced)
    except SourceError:
        return Folded(traced.model, {}, traced)


def rounded_fold(traced: Traced, plan: Plan) -> Folded:
    """The same with layers at 16 bits in float16, before or after they are folded, as they were measured."""
    if not has_float16(plan):
        return traced_fold(traced)
    folded = traced_fold(rounded_before(traced, plan))
    round_after(folded.model, plan)
    return folded


def halves_of(plan: Plan, rounded: nn.Module) -> dict[str, Tensor]:
    """The weights of the layers at 16 bits, of a model where they are in float16, by the layers' first names there."""
    weights = quantizable_weights(rounded)
    return {
        name: weights[name].detach()
        for name, layer in plan.by_any_name.items()
        if layer.rounded_in_float and name in weights
    }


def _close(weight: Tensor, other: Tensor) -> bool:
    return not weight.numel() or bool((weight - other).abs().max() <= CLOSE * other.abs().max())


def _factor(weight: Tensor, other: Tensor, axis: int) -> Tensor:
    """The factors that bring the model's weight closest to the graph's; 1 for channels that are all 0."""
    there, here = (channel_rows(tensor.detach().double(), axis) for tensor in (weight, other))
    norm = here.square().sum(1)
    factor = torch.where(norm == 0, 1.0, (there * here).sum(1) / norm.clamp_min(torch.finfo(torch.float64).tiny))
    return factor.to(other.dtype)


def _example(graph: torch.fx.GraphModule) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the shapes that the graph was exported for: seeded normal values, ids of 0 and 1, truth."""
    generator = torch.Generator().manual_seed(0)
    leaves = [_leaf(node.meta["val"], generator) for node in graph.graph.nodes if node.op == "placeholder"]
    return cast("tuple[tuple[Any, ...], dict[str, Any]]", tree_unflatten(leaves, cast(Any, graph)._in_spec))


def _leaf(like: Any, generator: torch.Generator) -> Any:
    if not isinstance(like, Tensor):
        return like
    shape = [int(size) for size in like.shape]
    if like.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(like.dtype)
    if like.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    return torch.randint(0, 2, shape, generator=generator).to(like.dtype)
