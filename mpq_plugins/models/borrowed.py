"""Parameters that a model's own code computes with outside the layer that owns them.

A head that is `F.linear(x, self.embedding.weight)`, an autoencoder's `F.conv_transpose2d(x, self.encoder.weight)`, or
`self.conv.weight.squeeze(1)`: whoever replaces such a layer, its weight's class, or folds a norm into it changes what
the other call computes, and no hook and no module tells of that. torch.fx sees it in models that it can trace. Here the
code itself is read: every `forward` that is a user's, with all that it calls by name, is followed with the model's real
modules and parameters in the place of `self` and its attributes. Reading a weight's dtype, device or shape is no use of
it; being an argument, an operand, or having any other attribute is. What is assigned to a name is followed. No code of
the model runs.
"""

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .metadata import LIKE, METADATA, OF_FIRST
from .plain import standard_class

# Calls that take a tensor as an example of its dtype, device or shape, or do not look at it.
BY_EXAMPLE = {*LIKE, *OF_FIRST, "isinstance", "hasattr", "id", "type", "len", "print", "callable"}
# Calls that give what they get, or what is in it.
THROUGH = {
    "zip", "enumerate", "reversed", "list", "tuple", "dict", "sorted", "set", "iter", "next", "filter", "islice",
    "chain", "cast",
}  # fmt: skip
BY_PATH = {"get_submodule", "get_parameter"}
OF_CONTAINERS = {"values", "items", "get", "pop", "copy"}
OF_MODULES: dict[str, Callable[[nn.Module], Iterable[Any]]] = {
    "children": nn.Module.children,
    "named_children": nn.Module.children,
    "modules": nn.Module.modules,
    "named_modules": nn.Module.modules,
    "parameters": nn.Module.parameters,
    "named_parameters": nn.Module.parameters,
    "state_dict": nn.Module.parameters,
}
CONTAINERS = (list, tuple, dict, set, nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
PASSES = 4  # over a function, as long as more is found to be assigned to its names

WEIGHT = 1  # where F.linear, F.embedding and the convolutions take their weight

Objects = dict[int, Any]
"""What an expression may be, by identity: modules, parameters, functions and containers of them."""
Uses = dict[int, set[Any]]
"""Parameters by identity, and the functions that take each for their weight; None among them for any other use."""


@dataclass(frozen=True)
class _Super:
    """`super()` in a method of `cls`."""

    cls: type
    instance: Any


def borrowed_in_source(model: nn.Module) -> set[str]:
    """Names of the parameters that code outside their own module computes with, under each of their owners' names.

    A layer's own forward uses its own weight, which is no borrowing; a hook on it is other code. Code that cannot be
    read (none is found, or it is compiled) is judged by the names in it, and borrows every parameter that they could
    mean.
    """
    return {*borrowed_uses(model)}


def borrowed_uses(model: nn.Module) -> dict[str, set[Any]]:
    """The same names, each with the functions that take it as their second argument, where all are given by position.

    None among them stands for other uses.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, f"{prefix}.{key}" if prefix else key))
    uses: dict[str, set[Any]] = {}
    for module in model.modules():
        is_layer = standard_class(module) is not None
        for used, functions in _used_by_forward(module).items():
            holders = owners.get(used, [])
            if is_layer and any(owner is module for owner, _ in holders):
                continue  # a layer's own, which others may be tied to
            for name in (name for owner, name in holders if owner is not module):
                uses.setdefault(name, set()).update(functions)
        for used, functions in _used_by_hooks(module).items():
            for _, name in owners.get(used, []):
                uses.setdefault(name, set()).update(functions)
    return uses


def _used_by_forward(module: nn.Module) -> Uses:
    reader = _Reader()
    for entry in ("forward", "__call__"):
        for function in reader.attribute(module, entry).values():
            reader.use(reader.call(function, [], {}))
    return reader.used


def _used_by_hooks(module: nn.Module) -> Uses:
    reader = _Reader()
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        reader.call(hook, [{id(module): module}], {})
    return reader.used


class _Reader:
    """Follows functions, and notes which tensors they compute with."""

    def __init__(self) -> None:
        self.used: Uses = {}
        self.known: dict[object, Objects] = {}

    def use(self, objects: Objects, function: Any = None) -> None:
        """Note what is used as a value, or as a function's weight; code that is handed over will be called."""
        for value in [*objects.values(), *_within(objects).values()]:
            if isinstance(value, Tensor):
                self.used.setdefault(id(value), set()).add(function)
            elif _is_code(value) and not isinstance(value, nn.Module):
                self.call(value, [], {})

    def attribute(self, value: Any, name: str) -> Objects:
        """What `value.name` may be."""
        if isinstance(value, Tensor):
            if name == "data":
                return _objects([value])
            if name not in METADATA:
                self.use({id(value): value})
            return {}
        if isinstance(value, _Super):
            mro = type(value.instance).__mro__
            later = mro[mro.index(value.cls) + 1 :] if value.cls in mro else ()
            return self._of_class(next((vars(cls)[name] for cls in later if name in vars(cls)), None), value.instance)
        if isinstance(value, type | types.ModuleType):
            return _objects([inspect.getattr_static(value, name, None)])
        attributes = getattr(value, "__dict__", {})
        places = (
            (attributes.get("_parameters"), attributes.get("_modules"), attributes)
            if isinstance(value, nn.Module)
            else (attributes,)
        )
        held = next((place[name] for place in places if place is not None and name in place), None)
        if held is not None:
            return _objects([held])
        return self._of_class(inspect.getattr_static(type(value), name, None), value)

    def _of_class(self, member: Any, instance: Any) -> Objects:
        """An attribute that a class has, as an instance of it sees it."""
        if isinstance(member, property):
            return self.call(types.MethodType(member.fget, instance), [], {}) if member.fget else {}
        if isinstance(member, functools.cached_property):
            return self.call(types.MethodType(member.func, instance), [], {})
        if isinstance(member, staticmethod):
            return _objects([member.__func__])
        if isinstance(member, classmethod):
            return _objects([types.MethodType(member.__func__, type(instance))])
        return _objects([types.MethodType(member, instance) if inspect.isfunction(member) else member])

    def call(self, callee: Any, args: list[Objects], kwargs: dict[str, Objects]) -> Objects:
        """What a call may return, when the callee is code that can be followed; else its arguments are used."""
        if isinstance(callee, functools.partial):
            before = [_objects([one]) for one in callee.args]
            named = {name: _objects([one]) for name, one in callee.keywords.items()} | kwargs
            return self.call(callee.func, [*before, *args], named)
        if isinstance(callee, types.MethodType):
            return self.call(callee.__func__, [_objects([callee.__self__]), *args], kwargs)
        if isinstance(callee, nn.Module):
            forward = vars(callee).get("forward", inspect.getattr_static(type(callee), "forward", None))
            bound = args if "forward" in vars(callee) else [_objects([callee]), *args]
            # What it does with its own parameters is found when its own code is read.
            return self.call(forward, bound, kwargs) if any(args) or any(kwargs.values()) else {}
        function = inspect.unwrap(callee) if inspect.isfunction(callee) else None
        if function is None or _is_torchs(function):
            for place, given in (*enumerate(args), *kwargs.items()):
                self.use(given, callee if place == WEIGHT and not kwargs else None)
            return {}
        return self._follow(function, args, kwargs)

    def _follow(self, function: types.FunctionType, args: list[Objects], kwargs: dict[str, Objects]) -> Objects:
        bound = _bound(function, args, kwargs)
        key = (function, tuple(sorted((name, *sorted(given)) for name, given in bound.items() if given)))
        if key in self.known:
            return self.known[key]  # of a function that calls itself, what is known so far
        self.known[key] = {}
        tree = _tree(function)
        if tree is None:
            given = (one for objects in bound.values() for one in objects.values())
            for used in _named_in_code(function.__code__, [*_closed_over(function), *given]):
                self.used.setdefault(used, set()).add(None)
            return {}
        body = _Body(self, function, bound)
        for _ in range(PASSES):
            before = sum(map(len, body.names.values()))
            for statement in tree.body:
                body.visit(statement)
            if sum(map(len, body.names.values())) == before:
                break
        self.known[key] = body.returned
        return body.returned


class _Body(ast.NodeVisitor):
    """One function with its names bound to what they may be, whatever the order of its statements."""

    def __init__(self, reader: _Reader, function: types.FunctionType, bound: dict[str, Objects]) -> None:
        self.reader, self.function, self.names = reader, function, bound
        self.returned: Objects = {}

    def visit_Return(self, node: ast.Return) -> None:
        """What a function returns is its caller's to use."""
        self.returned |= self.value(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Follow a name."""
        for target in node.targets:
            self.assign(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Follow a name."""
        if node.value is not None:
            self.assign(node.target, node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """An operand."""
        self.reader.use(self.value(node.target) | self.value(node.value))

    def visit_For(self, node: ast.For) -> None:
        """Follow what is in the series."""
        self.bind(node.target, self.inside(self.value(node.iter)))
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_With(self, node: ast.With) -> None:
        """Follow a name."""
        for item in node.items:
            given = self.value(item.context_expr)
            if item.optional_vars is not None:
                self.bind(item.optional_vars, given)
        for statement in node.body:
            self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """A function within this one sees its names; what it returns may be used."""
        inner = _Body(self.reader, self.function, self.names)
        for statement in node.body:
            inner.visit(statement)
        self.reader.use(inner.returned)

    def generic_visit(self, node: ast.AST) -> Objects:
        """Anything else may be what any part of it may be."""
        return _union(self.visit(child) or {} for child in ast.iter_child_nodes(node))

    def assign(self, target: ast.expr, source: ast.expr) -> None:
        """`target = source`, item by item where both are written out."""
        if isinstance(target, ast.Tuple) and isinstance(source, ast.Tuple) and len(target.elts) == len(source.elts):
            for one, other in zip(target.elts, source.elts, strict=True):
                self.assign(one, other)
        else:
            self.bind(target, self.value(source))

    def bind(self, target: ast.expr, given: Objects) -> None:
        """Give a name what it may be. What is kept elsewhere than in a name is used, and so is what is replaced."""
        if isinstance(target, ast.Name):
            self.names.setdefault(target.id, {}).update(given)
        elif isinstance(target, ast.Tuple | ast.List):
            for one in target.elts:
                self.bind(one, self.inside(given) | given)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, given)
        else:
            self.reader.use(given | self.value(target))

    def value(self, node: ast.expr | None) -> Objects:
        """What an expression may be; tensors that it computes with are noted."""
        objects: Objects = {} if node is None else self.visit(node)
        return objects

    def visit_Name(self, node: ast.Name) -> Objects:
        """A local name, or one of the function's surroundings."""
        if node.id in self.names:
            return self.names[node.id]
        return _objects([_surroundings(self.function).get(node.id)])

    def visit_Attribute(self, node: ast.Attribute) -> Objects:
        """An attribute of each thing that it may be."""
        return _union(self.reader.attribute(one, node.attr) for one in self.value(node.value).values())

    def visit_Subscript(self, node: ast.Subscript) -> Objects:
        """One of a container's, by its number or name where that is written out."""
        self.value(node.slice)
        objects: Objects = {}
        for one in self.value(node.value).values():
            if isinstance(one, Tensor):
                self.reader.use({id(one): one})
            elif isinstance(one, CONTAINERS):
                objects |= _objects(_item(one, node.slice))
        return objects

    def visit_BinOp(self, node: ast.BinOp) -> Objects:
        """Operands are used."""
        self.reader.use(self.value(node.left) | self.value(node.right))
        return {}

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Objects:
        """The operand is used, unless it is asked whether it is there."""
        given = self.value(node.operand)
        if not isinstance(node.op, ast.Not):
            self.reader.use(given)
        return {}

    def visit_Compare(self, node: ast.Compare) -> Objects:
        """`is` compares no values."""
        given = [self.value(part) for part in (node.left, *node.comparators)]
        if not all(isinstance(operator, ast.Is | ast.IsNot | ast.In | ast.NotIn) for operator in node.ops):
            for one in given:
                self.reader.use(one)
        return {}

    def visit_Lambda(self, node: ast.Lambda) -> Objects:
        """What it would return may be used."""
        self.reader.use(self.value(node.body))
        return {}

    def visit_NamedExpr(self, node: ast.NamedExpr) -> Objects:
        """Follow a name."""
        self.bind(node.target, self.value(node.value))
        return self.value(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> Objects:
        """Text."""
        return {}

    def visit_comprehension(self, node: ast.comprehension) -> Objects:
        """Follow what is in the series; the next pass knows its name where it is used."""
        self.bind(node.target, self.inside(self.value(node.iter)))
        for condition in node.ifs:
            self.value(condition)
        return {}

    def visit_Yield(self, node: ast.Yield) -> Objects:
        """As what is returned."""
        self.returned |= self.value(node.value)
        return {}

    def visit_YieldFrom(self, node: ast.YieldFrom) -> Objects:
        """As what is returned."""
        self.returned |= self.inside(self.value(node.value))
        return {}

    def visit_Call(self, node: ast.Call) -> Objects:
        """What a call may return; what it gets is used, or followed into it."""
        args = [self.value(one) for one in node.args]
        kwargs = {one.arg or "": self.value(one.value) for one in node.keywords}
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        held = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else {}
        if name == "super":
            return self._super()
        if name == "getattr" and len(node.args) > 1:
            return self._getattr(args[0], node.args[1]) | (args[2] if len(args) > 2 else {})
        if name in BY_PATH and node.args and any(isinstance(one, nn.Module) for one in held.values()):
            return self._getattr(held, node.args[0])
        if name in THROUGH and not held:
            return self.inside(_union(args))
        if name in OF_CONTAINERS and any(isinstance(one, CONTAINERS) for one in held.values()):
            return _within(held)
        if name in OF_MODULES and any(isinstance(one, nn.Module) for one in held.values()):
            modules = [one for one in held.values() if isinstance(one, nn.Module)]
            return _objects(one for module in modules for one in OF_MODULES[name](module))
        callees = self.value(node.func)
        if name in BY_EXAMPLE and not any(map(_is_code, callees.values())):
            return {}
        return _union(self.reader.call(callee, args, kwargs) for callee in (callees.values() or [None]))

    def inside(self, given: Objects) -> Objects:
        """What is given, and what is in the containers among it."""
        return given | _within(given)

    def _super(self) -> Objects:
        cls, first = _surroundings(self.function).get("__class__"), next(iter(self.names.values()), {})
        return _objects(_Super(cls, one) for one in first.values()) if isinstance(cls, type) else {}

    def _getattr(self, given: Objects, name: ast.expr) -> Objects:
        if isinstance(name, ast.Constant):
            for part in str(name.value).split("."):
                given = _union(self.reader.attribute(one, part) for one in given.values())
            return given
        self.value(name)
        modules = [one for one in given.values() if isinstance(one, nn.Module)]
        return _objects(
            held for one in modules for held in (*one._parameters.values(), *one._modules.values(), *vars(one).values())
        )


def _objects(values: Iterable[Any]) -> Objects:
    """Values that can lead to a parameter."""
    return {id(value): value for value in values if _leads_on(value)}


def _union(parts: Iterable[Objects]) -> Objects:
    objects: Objects = {}
    for part in parts:
        objects |= part
    return objects


def _leads_on(value: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(value, nn.Parameter)
    return not (value is None or isinstance(value, str | bytes | int | float | bool | complex))


def _is_code(value: Any) -> bool:
    """Whether calling it runs code that can be followed."""
    function = getattr(value, "__func__", value)
    is_users = inspect.isfunction(function) and not _is_torchs(function)
    return is_users or isinstance(value, nn.Module | functools.partial)


def _is_torchs(function: Callable[..., Any]) -> bool:
    module = getattr(function, "__module__", None) or ""
    return module == "torch" or module.startswith("torch.")


def _within(objects: Objects) -> Objects:
    """What the containers among objects hold."""
    reached: Objects = {}
    for one in objects.values():
        if isinstance(one, CONTAINERS):
            reached |= _objects(_contents(one))
    return reached


def _contents(container: Any) -> list[Any]:
    """What a container holds, itself or in tuples and lists."""
    if isinstance(container, nn.ParameterList | nn.ParameterDict):
        return [*container.parameters()]
    if isinstance(container, nn.Module):
        return [*container.children()]
    held = [*(container.values() if isinstance(container, dict) else container)]
    return [*held, *(one for inner in held if isinstance(inner, list | tuple | dict) for one in _contents(inner))]


def _item(container: Any, index: ast.expr) -> list[Any]:
    if isinstance(index, ast.Constant):
        try:
            return [container[index.value]]
        except (IndexError, KeyError, TypeError):
            return []
    return [*_contents(container)]


def _bound(function: types.FunctionType, args: list[Objects], kwargs: dict[str, Objects]) -> dict[str, Objects]:
    """A function's names with what they are called with; what does not fit goes to all of them."""
    code = function.__code__
    positional = code.co_varnames[: code.co_argcount]
    every = code.co_varnames[
        : code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
    ]
    bound: dict[str, Objects] = {name: {} for name in every}
    rest: Objects = {}
    for number, given in enumerate(args):
        if number < len(positional):
            bound[positional[number]] = dict(given)
        else:
            rest |= given
    for name, given in kwargs.items():
        if name in bound:
            bound[name] = dict(given)
        else:
            rest |= given
    for name in every[code.co_argcount + code.co_kwonlyargcount :]:
        bound[name] = dict(rest)
    return bound


@functools.cache
def _tree(function: types.FunctionType) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """A function's code; None where no source is found, and for lambdas, whose lines hold other code as well."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
        first = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, ValueError, IndexError):
        return None
    return first if isinstance(first, ast.FunctionDef | ast.AsyncFunctionDef) else None


def _surroundings(function: types.FunctionType) -> Mapping[str, Any]:
    """The names that a function sees around it."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    closed = {}
    for name, cell in cells:
        try:
            closed[name] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    return _Layered(closed, function.__globals__)


@dataclass(frozen=True)
class _Layered(Mapping[str, Any]):
    """One mapping in front of another."""

    first: Mapping[str, Any]
    second: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.first[name] if name in self.first else self.second[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.second, **self.first})

    def __len__(self) -> int:
        return len({**self.second, **self.first})


def _closed_over(function: types.FunctionType) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or () if _is_set(cell)]


def _is_set(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _named_in_code(code: types.CodeType, roots: Iterable[Any]) -> set[int]:
    """The parameters below any root whose names, from there, are all in the code."""
    names = _names_in(code)
    parameters: set[int] = set()
    for root in (root for root in roots if isinstance(root, nn.Module)):
        for name, parameter in root.named_parameters(remove_duplicate=False):
            parts = [part for part in name.split(".") if not part.isdigit()]
            if all(part in names for part in parts):
                parameters.add(id(parameter))
    return parameters


def _names_in(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    text = {constant for constant in code.co_consts if isinstance(constant, str)}
    return {*code.co_names, *text}.union(*map(_names_in, inner)) if inner else {*code.co_names, *text}
