"""A model's graph as torch.fx sees it, and the parameters that a model uses outside their own layer.

Layers and norms of torch.nn, subclasses included, are nodes of the graph, not code to look into.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Lock, get_ident
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..common.text import what_it_said
from ..errors import SourceError
from .metadata import METADATA, OF_FIRST, WITHOUT_VALUES
from .plain import is_plain

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
LAYERS = (nn.Linear, nn.Embedding, *CONVOLUTIONS)

TRAINING = "training"  # in the meta of a module's node: the mode that the module is called in

# While it traces, torch.fx replaces nn.Module.__call__ for the whole process: one trace at a time.
_TRACING = Lock()


class _Tracer(torch.fx.Tracer):
    """Takes a user's own subclass of a layer or norm for what it is, unless it is to be looked into.

    torch.fx patches nn.Module for the whole process while it traces; other threads get what they would without it.
    """

    def __init__(self, inside: Collection[nn.Module] = ()) -> None:
        super().__init__()
        self.thread, self.inside, self.missed_a_bias = get_ident(), inside, False

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if get_ident() != self.thread:
            return attr_val
        self.missed_a_bias |= attr == "bias" and attr_val is None
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if get_ident() != self.thread:
            return forward(*args, **kwargs)
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(result, torch.fx.Proxy):
            result.node.meta.setdefault(TRAINING, m.training)
        return result

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.inside:
            return False
        return isinstance(m, (*LAYERS, *BATCH_NORMS)) or super().is_leaf_module(m, module_qualified_name)


class Traced:
    """A model as torch.fx sees it. It is traced when first asked, once for all that is asked, and left as it was.

    The model must not change meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    def of(cls, model: "nn.Module | Traced") -> "Traced":
        """A model that is traced already, or is going to be."""
        return model if isinstance(model, Traced) else cls(model)

    @property
    def graph(self) -> torch.fx.Graph:
        """The model's graph. Raises SourceError where torch.fx cannot trace it."""
        return self._closed.graph

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """Tensors that the graph reads and the model does not hold, by the names that they have in the graph."""
        return self._closed.constants

    @cached_property
    def lent(self) -> set[str]:
        """Names of parameters and buffers whose values the model uses outside their own module, as torch.fx sees it.

        Layers that compute in their own way are looked into; where torch.fx cannot do that, whatever such a layer could
        reach counts. A plain layer without a bias lends it where it is asked for, for folding and correcting make one.
        Of norms, which folding takes away, everything that is read counts. Raises SourceError where the model cannot be
        traced at all.
        """
        odd = [name for name, module in self.model.named_modules() if _is_odd(module)]
        if not odd and self._closed.lent is not None:
            return self._closed.lent
        try:
            return _lent(self.model, odd)
        except Exception:  # noqa: BLE001  # a user's layer may not be traceable; then it stays closed
            self.graph  # noqa: B018  # which says why, where the model is not traceable either
        return _lent(self.model, ()).union(*(_lent_by(self.model, name) for name in odd))

    @cached_property
    def _closed(self) -> "_Closed":
        try:
            return _closed(self.model)
        except Exception:  # noqa: BLE001  # a user's forward may raise anything, and without the modes it may not
            return _Closed(_graph(self.model, looks_inside=False), {}, None)


def trace(model: nn.Module) -> torch.fx.Graph:
    """The model's graph, which leaves the model as it was. Raises SourceError where torch.fx cannot trace it."""
    return Traced(model).graph


def opened_trace(model: nn.Module) -> torch.fx.Graph:
    """The same with layers and norms that compute in their own way looked into. Raises SourceError."""
    return _graph(model, looks_inside=True)


def _graph(model: nn.Module, looks_inside: bool) -> torch.fx.Graph:
    try:
        shadow = _shadow(model)
        with _TRACING, _PutBack():
            return _Tracer([module for module in shadow.modules() if looks_inside and _is_odd(module)]).trace(shadow)
    except Exception as error:  # a user's forward may raise anything while being traced
        raise SourceError(
            f"{type(model).__name__}: cannot be traced to find which BatchNorm follows which convolution "
            f"({what_it_said(error)}). "
            "Measure with fold_bn=False, or per_channel, where folding changes no code."
        ) from error


def borrowed_parameters(model: nn.Module) -> set[str]:
    """What a model lends, as Traced.lent says."""
    return Traced(model).lent


def _lent_by(model: nn.Module, name: str) -> set[str]:
    """What one layer that computes in its own way uses of others: what the trace shows, else all within its reach."""
    try:
        return _lent(model, [name])
    except Exception:  # noqa: BLE001  # a user's forward may raise anything while being traced
        return _named(model, {memory(tensor) for tensor in _within_reach(model.get_submodule(name))})


def memory(tensor: Tensor) -> int:
    """What two tensors that begin in the same memory have in common."""
    if tensor.is_meta or isinstance(tensor, nn.UninitializedParameter) or not tensor.numel():
        return id(tensor)
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own
        return id(tensor)


def _shadow(model: nn.Module) -> nn.Module:
    """A copy that shares all tensors: what a forward or a hook sets while it is traced, it sets there."""
    tensors = [tensor for module in model.modules() for tensor in _held(vars(module))]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@dataclass(frozen=True)
class _Closed:
    """A trace in which every layer is a node. lent: as in Traced, or None where this trace does not say it."""

    graph: torch.fx.Graph
    constants: Mapping[str, Tensor]
    lent: set[str] | None


def _closed(model: nn.Module) -> _Closed:
    """lent: unknown where a layer computes in its own way, or a forward asked for a bias that folding would make."""
    shadow = _shadow(model)
    tracer = _Tracer()
    eager = _EagerReads(tracer)
    with _TRACING, _PutBack(), eager:
        graph = tracer.trace(shadow)
    reads = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    made = {name: getattr(shadow, name, None) for name in reads if "." not in name and not hasattr(model, name)}
    constants = {name: value for name, value in made.items() if isinstance(value, Tensor)}
    known = not tracer.missed_a_bias and not any(_is_odd(module) for module in shadow.modules())
    return _Closed(graph, constants, _lent_in(graph, shadow, eager) if known else None)


def _lent(model: nn.Module, inside: Collection[str]) -> set[str]:
    """inside: layers that are looked into."""
    shadow = _shadow(model)
    for module in shadow.modules():
        if isinstance(module, LAYERS) and is_plain(module) and module._parameters.get("bias", module) is None:
            module._parameters["bias"] = nn.Parameter(torch.zeros(1))
    tracer = _Tracer([shadow.get_submodule(name) for name in inside])
    eager = _EagerReads(tracer)
    with _TRACING, _PutBack(), eager:
        graph = tracer.trace(shadow)
    return _lent_in(graph, shadow, eager)


def _lent_in(graph: torch.fx.Graph, shadow: nn.Module, eager: "_EagerReads") -> set[str]:
    """What a graph of the shadow, and what was worked with while it was made, lend."""
    owners = _Owners(shadow)
    reads = [(owners.tensor(node), user) for node in graph.nodes if node.op == "get_attr" for user in node.users]
    lent = {
        memory(tensor)
        for tensor, user in reads
        if (_takes_values(user) or owners.is_norms(tensor)) and not owners.owns(_scope(user), tensor)
    } | {memory(tensor) for tensor, scope in eager.reads if not owners.owns(scope, tensor)}
    return _named(shadow, lent)


@contextmanager
def tensors_kept(model: nn.Module) -> Iterator[None]:
    """Buffers and tensors in attributes as they were at the end, whatever the model writes into them as it runs."""
    held = [tensor for module in model.modules() for name, tensor in _plain_tensors(module)]
    known = [(tensor, tensor.clone()) for tensor in held]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in known:
                if not tensor.equal(values):
                    tensor.copy_(values)


def _plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_buffers(recurse=False)
    for name, value in vars(module).items():
        if name not in ("_modules", "_parameters", "_buffers"):
            yield from ((name, tensor) for tensor in _held(value) if not isinstance(tensor, nn.Parameter))


def _is_odd(module: nn.Module) -> bool:
    return isinstance(module, (*LAYERS, *BATCH_NORMS)) and not is_plain(module)


class _PutBack(TorchDispatchMode):
    """What a forward writes into tensors while it is traced, such as a count of its calls, is put back at the end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before = list[tuple[Tensor, Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        given |= kwargs or {}
        written = [
            given.get(argument.name)
            for argument in func._schema.arguments
            if argument.alias_info and argument.alias_info.is_write
        ]
        self.before += [(leaf, leaf.clone()) for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for tensor, values in reversed(self.before):
                tensor.copy_(values)


class _EagerReads(TorchFunctionMode):
    """Tensors whose values are worked with while a model is traced, so that the graph knows the results alone."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer, self.reads = tracer, list[tuple[Tensor, str]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in WITHOUT_VALUES:
            scope = next((str(path) for path, _ in reversed(self.tracer.module_stack.values())), "")
            self.reads += [(leaf, scope) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return func(*args, **(kwargs or {}))


class _Owners:
    """Which modules hold a tensor as their own parameter or buffer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))

    def tensor(self, node: torch.fx.Node) -> Tensor:
        """What a node that reads an attribute reads."""
        held: Any = self.model
        for part in str(node.target).split("."):
            held = getattr(held, part, None)
        return held if isinstance(held, Tensor) else torch.empty(0)

    def owns(self, path: str, tensor: Tensor) -> bool:
        """Whether the module at the path has this very memory as its own."""
        module = self.modules.get(path)
        return module is not None and memory(tensor) in {memory(one) for one in _own(module)}

    def is_norms(self, tensor: Tensor) -> bool:
        """Whether a BatchNorm has it."""
        return any(isinstance(m, BATCH_NORMS) and self.owns(path, tensor) for path, m in self.modules.items())


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _scope(node: torch.fx.Node) -> str:
    """The path of the module in whose forward a node came about."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _takes_values(user: torch.fx.Node) -> bool:
    if user.target is getattr:
        return str(user.args[1]) not in METADATA
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    if name in OF_FIRST and user.op == "call_method":
        first = user.args[0] if user.args else None
        return isinstance(first, torch.fx.Node) and first.op == "get_attr"
    return name not in WITHOUT_VALUES


def _named(model: nn.Module, memories: Collection[int]) -> set[str]:
    """The names, all of them, under which the model has tensors in these memories."""
    state = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name for name, tensor in state if memory(tensor) in memories}


def _within_reach(layer: nn.Module) -> Iterator[Tensor]:
    """Tensors that a layer's forward could use: those of modules in it or held in its attributes."""
    for module in layer.modules():
        if module is not layer:
            yield from _own(module)
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
