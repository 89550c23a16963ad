"""A model's graph as torch.fx sees it, and the parameters that a model uses outside their own layer.

Layers and norms of torch.nn, subclasses included, are nodes of the graph, not code to look into.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from .errors import SourceError, what_it_said
from .plain import is_plain

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
LAYERS = (nn.Linear, nn.Embedding, *CONVOLUTIONS)

# What is read of a tensor without its values.
METADATA = {
    "dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "layout", "itemsize", "nbytes", "size", "dim",
    "numel", "nelement", "element_size", "stride", "is_floating_point", "is_contiguous", "get_device", "new_zeros",
    "new_ones", "new_empty", "new_full", "new_tensor", "type_as", "to", "zeros_like", "ones_like", "empty_like",
    "full_like", "rand_like", "randn_like",
}  # fmt: skip
VALUES_OF_FIRST = {"to", "type_as"}  # x.to(y) gives x's values, in y's dtype

CONSTANT = "mpq_plugins_constant"

# While it traces, torch.fx replaces nn.Module.__call__ for the whole process: one trace at a time.
_TRACING = Lock()


class _Tracer(torch.fx.Tracer):
    """Takes a user's own subclass of a layer or norm for what it is, unless it is to be looked into.

    torch.fx patches nn.Module for the whole process while it traces; other threads get what they would without it.
    """

    def __init__(self, inside: Collection[nn.Module] = ()) -> None:
        super().__init__()
        self.thread, self.inside = get_ident(), inside

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
        if m in self.inside:
            return False
        return isinstance(m, (*LAYERS, *BATCH_NORMS)) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> torch.fx.Graph:
    """The model's graph. Raises SourceError where torch.fx cannot trace it."""
    try:
        return _traced(model, ())
    except Exception as error:  # a user's forward may raise anything while being traced
        raise SourceError(
            f"{type(model).__name__}: cannot be traced to find which BatchNorm follows which convolution "
            f"({what_it_said(error)}). "
            "Measure with fold_bn=False, or per_channel, where folding changes no code."
        ) from error


def borrowed_parameters(model: nn.Module) -> set[str]:
    """Names of parameters and buffers whose values the model uses outside their own module, as torch.fx sees it.

    Layers that compute in their own way are looked into; where torch.fx cannot do that, whatever such a layer could
    reach counts. Raises SourceError where the model cannot be traced at all.
    """
    odd = [module for module in model.modules() if isinstance(module, (*LAYERS, *BATCH_NORMS)) and not is_plain(module)]
    try:
        return _used(_traced(model, odd), model)
    except Exception:  # noqa: BLE001  # a user's layer may not be traceable; then it stays closed
        return _used(trace(model), model) | _named(model, [tensor for layer in odd for tensor in _within_reach(layer)])


def _traced(model: nn.Module, inside: Collection[nn.Module]) -> torch.fx.Graph:
    """The graph; tensors that no module holds, which torch.fx puts on the model, are in their nodes' `meta` instead."""
    before = {*vars(model)}
    with _TRACING, _unchanged(model):
        graph = _Tracer(inside).trace(model)
        for node in graph.nodes:
            if node.op == "get_attr" and node.target not in before and node.target in vars(model):
                node.meta[CONSTANT] = vars(model)[node.target]
    return graph


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what a forward or a hook sets on its module: while torch.fx traces, that is no value but a proxy."""
    kept = [(state, dict(state)) for module in model.modules() for state in _state(module)]
    lists = [(held, list(held)) for state, _ in kept for held in state.values() if type(held) is list]
    try:
        yield
    finally:
        for state, values in kept:
            _restore(state, values)
        for held, items in lists:
            held[:] = items


def _restore(state: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Change no more than differs: another thread may be running the model."""
    for name in state.keys() - values.keys():
        del state[name]
    if state.keys() != values.keys():  # what was taken away comes back in its old place
        state.clear()
    state.update({name: value for name, value in values.items() if state.get(name, state) is not value})


def _state(module: nn.Module) -> list[dict[str, Any]]:
    """The dicts that hold a module's attributes, parameters and buffers, and those that it keeps itself."""
    own = vars(module)
    return [own, *(held for held in own.values() if type(held) is dict)]


def _used(graph: torch.fx.Graph, model: nn.Module) -> set[str]:
    """What the graph's calls take the values of, but for a module's own within it; under all its names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    reads = [node for node in graph.nodes if node.op == "get_attr"]
    lent = [node for node in reads if any(_borrows(user, node, modules) for user in node.users)]
    return _named(model, [_tensor(node, model) for node in lent])


def _borrows(user: torch.fx.Node, node: torch.fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a call takes the values of a tensor outside the module that holds it."""
    if not _takes_values(user, node):
        return False
    stack = list(user.meta.get("nn_module_stack", {}).values())
    scope = modules.get(str(stack[-1][0]) if stack else "")
    return CONSTANT in node.meta or modules.get(str(node.target).rpartition(".")[0]) is not scope


def _takes_values(user: torch.fx.Node, node: torch.fx.Node) -> bool:
    if user.target is getattr:
        return str(user.args[1]) not in METADATA
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    if name in VALUES_OF_FIRST and user.op == "call_method":
        return bool(user.args) and user.args[0] is node
    return name not in METADATA


def _tensor(node: torch.fx.Node, model: nn.Module) -> object:
    found: object = model
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return node.meta.get(CONSTANT, found)


def _named(model: nn.Module, tensors: Collection[object]) -> set[str]:
    """The names, all of them, under which the model has these tensors, or others in the same memory."""
    wanted = {memory(tensor) for tensor in tensors if isinstance(tensor, Tensor)}
    state = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name for name, tensor in state if memory(tensor) in wanted}


def memory(tensor: Tensor) -> int:
    """What two tensors that begin in the same memory have in common."""
    if tensor.is_meta or isinstance(tensor, nn.UninitializedParameter) or not tensor.numel():
        return id(tensor)
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own
        return id(tensor)


def _within_reach(layer: nn.Module) -> Iterator[Tensor]:
    """Tensors that a layer's forward could use: those of modules in it or held in its attributes."""
    for module in layer.modules():
        if module is not layer:
            yield from (*module.parameters(recurse=False), *module.buffers(recurse=False))
    for name, value in vars(layer).items():
        if name not in ("_modules", "_parameters", "_buffers"):
            yield from _held(value)


def _held(value: object, depth: int = 4) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from (*value.parameters(), *value.buffers())
    elif depth:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
        for one in inner:
            yield from _held(one, depth - 1)
