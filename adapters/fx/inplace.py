"""Values that a forward changes in place, told to torch's FX quantization, which takes a value's codes only once.

FX takes a value's codes where it arises, so a later change in place is lost on whatever reads the codes. Where nothing
else holds the same memory, all that reads the value after the change is given the changed one; otherwise it is refused.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch.fx
from torch import nn
from torch.fx import Node

from mpq_plugins.errors import MismatchError

# What gives back, or may, the memory that it is given.
VIEWS = {
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose",
    "t", "movedim", "swapaxes", "swapdims", "expand", "expand_as", "broadcast_to", "narrow", "select", "unbind",
    "chunk", "split", "tensor_split", "getitem", "diagonal", "unfold", "detach", "contiguous", "to", "float", "type",
    "dropout", "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d", "pos", "positive", "getattr",
    "real", "moveaxis", "hsplit", "vsplit", "dsplit", "atleast_1d", "atleast_2d", "atleast_3d", "ravel", "squeeze_",
}  # fmt: skip
VIEWING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


def follow_changes(graph: torch.fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Give what a forward changed in place to all that reads it later. Raises MismatchError where a view reads it."""
    place = {node: number for number, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        changed = _changed(node, modules)
        if changed is None:
            continue
        for other in _sharing(changed, node, modules):
            late = [user for user in other.users if user is not node and place[user] > place[node]]
            if late and other is not changed:
                raise MismatchError(
                    f"fx: {node.name!r} changes {changed.name!r} in place, and {late[0].name!r} reads the same memory "
                    f"through {other.name!r} later, which FX would not notice: write {node.name!r} out of place"
                )
            for user in late:
                user.replace_input_with(changed, node)


def _changed(node: Node, modules: Mapping[str, nn.Module]) -> Node | None:
    """The value that a node changes in place, and gives."""
    out = node.kwargs.get("out")
    if isinstance(out, Node):
        return out
    return node.all_input_nodes[0] if node.all_input_nodes and _inplace(node, modules) else None


def _inplace(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return getattr(modules[str(node.target)], "inplace", False) is True
    if node.op not in ("call_function", "call_method"):
        return False
    name = _name(node)
    return node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))


def _sharing(value: Node, change: Node, modules: Mapping[str, nn.Module]) -> Iterator[Node]:
    """All values that may lie in the same memory as one, but for those that come of a change to it."""
    while _views(value, modules):
        value = value.all_input_nodes[0]
    waiting = [value]
    while waiting:
        shared = waiting.pop()
        yield shared
        waiting += [user for user in shared.users if user is not change and _views(user, modules)]


def _views(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    if not node.all_input_nodes:
        return False
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], VIEWING)
    return _inplace(node, modules) or _name(node) in VIEWS


def _name(node: Node) -> str:
    target: Any = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", ""))
