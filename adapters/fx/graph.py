"""The graph that torch's FX quantization is given: what may stay in codes does, and all else is walled off.

torch fuses, and lowers to kernels on codes, whatever looks like one of its patterns: a ReLU with a hook, a BatchNorm
that is no pair with its convolution, a pooling whose result a sum in float needs as well. Here the planned layers, the
ReLU right after them, sums of two values in codes and max pooling stay in codes; everything else is in float, and a
function that is in none of torch's patterns stands between the two.
"""

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from mpq_plugins.models.plain import is_plain

WALL = operator.pos  # gives back what it is given, and torch has no pattern for it
RELUS: set[Any] = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
SUMS: set[Any] = {operator.add, torch.add, "add", "add_"}
POOLING = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
FUSED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
         nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # fmt: skip


@dataclass(frozen=True)
class InCodes:
    """The operators between planned layers that stay in codes: modules by name, sums by their place among all."""

    modules: tuple[str, ...]
    sums: tuple[int, ...]


def divide(root: nn.Module, graph: torch.fx.Graph, planned: Collection[str]) -> InCodes:
    """Divide a graph into what works on codes, starting from the planned layers, and what works on floats.

    Operators that stay in codes become modules of their own in `root`, or torch.add, for torch tells them by name and
    by number; edges between codes and floats get walls, and so does what torch would fuse.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    codes: set[Node] = set()
    for node in graph.nodes:
        takes_codes = bool(node.args) and bool(node.all_input_nodes) and codes.issuperset(node.all_input_nodes)
        if _calls(node, planned) or (takes_codes and _keep(root, node, planned, modules)):
            codes.add(node)
    names = [str(node.target) for node in graph.nodes if node in codes and node.op == "call_module"]
    for node in list(graph.nodes):
        _wall(graph, node, [user for user in node.users if _is_border(node, user, codes, modules)], node in codes)
    sums = [node for node in graph.nodes if node.op == "call_function" and node.target is torch.add]
    between = tuple(name for name in names if name not in planned)
    return InCodes(between, tuple(place for place, node in enumerate(sums) if node in codes))


def _calls(node: Node, names: Collection[str]) -> bool:
    return node.op == "call_module" and node.target in names


def _keep(root: nn.Module, node: Node, planned: Collection[str], modules: Mapping[str, nn.Module]) -> bool:
    """Have an operator stay in codes, where it is one that can."""
    operator_ = _relu(node, planned, modules) or _pool(node, modules)
    if operator_ is not None:
        name = _unused(root, f"{node.name}_in_codes")
        root.add_module(name, operator_.train(root.training))
        node.op, node.target, node.args, node.kwargs = "call_module", name, node.args[:1], {}
    elif _is_sum(node):
        node.op, node.target = "call_function", torch.add
    else:
        return False
    return True


def without(graph: torch.fx.Graph, names: Collection[str]) -> None:
    """Take out calls of modules that give back what they are given."""
    for node in list(graph.nodes):
        if _calls(node, names):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


def by_position(root: nn.Module, graph: torch.fx.Graph) -> None:
    """Give layers, norms and ReLUs their input by position; torch's passes look nowhere else."""
    modules = dict(root.named_modules(remove_duplicate=False))
    for node in graph.nodes:
        known = node.op == "call_module" and isinstance(modules[str(node.target)], (nn.ReLU, *FUSED))
        if not node.args and "input" in node.kwargs and (known or _function(node) in RELUS):
            node.args = (node.kwargs["input"],)
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "input"}


def lend_shapes(root: nn.Module, graph: torch.fx.Graph, names: Collection[str]) -> None:
    """Have a graph read shapes, dtypes and devices of these layers' parameters where they will still be parameters."""
    for node in graph.nodes:
        owner = str(node.target).rpartition(".")[0]
        if node.op == "get_attr" and owner in names:
            parameter = root.get_parameter(str(node.target))
            node.target = _unused(root, f"{node.name}_shape")
            root.register_buffer(node.target, parameter.new_zeros(()).expand(parameter.shape))


def _function(node: Node) -> Any:
    """The function or method that a node calls; a module may have the name of a method."""
    return node.target if node.op in ("call_function", "call_method") else None


def _is_border(node: Node, user: Node, codes: Collection[Node], modules: Mapping[str, nn.Module]) -> bool:
    """Whether torch must not see these two together."""
    if user.op == "output" or node.op == "placeholder" or (node in codes and user in codes):
        return False
    fused = node.op == "call_module" and isinstance(modules.get(str(node.target)), FUSED)
    return fused or node in codes or user in codes


def _wall(graph: torch.fx.Graph, node: Node, users: list[Node], codes: bool) -> None:
    """Put a wall behind a node. Kernels on codes order memory in their own way, which views in float do not expect."""
    if users:
        with graph.inserting_after(node):
            wall = graph.call_method("contiguous", (node,)) if codes else graph.call_function(WALL, (node,))
        for user in users:
            user.replace_input_with(node, wall)


def _relu(node: Node, planned: Collection[str], modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """A ReLU that torch fuses with the layer or the sum before it; any other would leave half of its codes unused."""
    source = node.all_input_nodes[0]
    if len(source.users) > 1 or not (_calls(source, planned) or source.target is torch.add):
        return None
    return nn.ReLU() if _function(node) in RELUS or _is(node, nn.ReLU, modules) else None


def _pool(node: Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """A max pooling of images, which takes codes as they are."""
    if _is(node, nn.MaxPool2d, modules):
        pool: Any = modules[str(node.target)]
        settings = {name: getattr(pool, name) for name in POOLING}
    elif _function(node) in (F.max_pool2d, torch.max_pool2d) and len(node.all_input_nodes) == 1:
        settings = dict(zip(POOLING, node.args[1:], strict=False)) | node.kwargs
    else:
        return None
    return None if settings.get("return_indices") else nn.MaxPool2d(**settings)


def _is(node: Node, kind: type[nn.Module], modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node calls torch's own module of a kind, with nothing added."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, kind) and is_plain(module)


def _is_sum(node: Node) -> bool:
    """Whether a node adds two values and does no more; torch's kernels know no `alpha`."""
    return _function(node) in SUMS and not node.kwargs and [isinstance(arg, Node) for arg in node.args] == [True, True]


def _unused(root: nn.Module, name: str) -> str:
    """A name that the module has nothing under."""
    while hasattr(root, name):
        name += "_"
    return name
