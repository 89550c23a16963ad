"""Whether a module computes exactly what torch's own class of its kind does, so that its formula may be relied on.

Folding BatchNorm into a convolution, predicting an output's error from a layer's inputs, or correcting a bias are
statements about torch's own classes. A subclass with a forward of its own, a parametrized weight, or a hook computes
something else, and what is known of its parent says nothing about it.
"""

from torch import Tensor, nn

from .input_ranges import is_input_quantizer

# What a subclass may define again without computing otherwise.
HARMLESS = {
    "__module__", "__doc__", "__init__", "__qualname__", "__annotations__", "__constants__", "__parameters__",
    "__dict__", "__weakref__", "__repr__", "__str__", "__hash__", "__eq__", "__firstlineno__", "__static_attributes__",
    "__annotate__", "__annotations_cache__", "__orig_bases__", "__abstractmethods__", "_abc_impl", "__slots__",
    "__init_subclass__", "__class_getitem__", "__getstate__", "__setstate__", "__deepcopy__", "__copy__", "__reduce__",
    "extra_repr", "reset_parameters", "reset_running_stats", "from_pretrained", "train", "eval", "requires_grad_",
    "state_dict", "load_state_dict", "get_extra_state", "set_extra_state", "_save_to_state_dict",
    "_load_from_state_dict", "_version", "_fill_padding_idx_with_zero", "_get_name", "_check_input_dim",
}  # fmt: skip
STORED = ("weight", "bias")


def standard_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn that a module is, or is a subclass of; None for a user's own module."""
    classes = (cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.modules."))
    standard = next(classes, nn.Module)
    return None if standard is nn.Module else standard


def is_plain(module: nn.Module) -> bool:
    """Whether a module computes what its class of torch.nn computes, from parameters of its own."""
    return not why_not_plain(module)


def why_not_plain(module: nn.Module, *, hooks: bool = True) -> str:
    """In what a module differs from its class of torch.nn, to be said after its name; empty where it does not.

    It is judged by its class, its hooks and its parameters. Who else uses its weight is a question about the whole
    model: `fold.borrowed_weights` answers it. hooks: whether hooks matter, as they do not to who leaves them in place.
    """
    standard = standard_class(module)
    kind = type(module).__name__
    if standard is None:
        return f"is a {kind}, no layer of torch.nn"
    changed = _redefined(module, standard)
    if changed:
        return f"is a {kind}, which computes in its own way ({changed})"
    if hooks and _hooks(module):
        return "has forward hooks, which may change what it computes"
    if not _stores_its_weight(module):
        return "has a weight that is computed or replaced, not a parameter of its own"
    if getattr(module, "max_norm", None) is not None:
        return "has max_norm, which changes its weight as it runs"
    return ""


def _redefined(module: nn.Module, standard: type[nn.Module]) -> str:
    """The first name that a subclass, or the module itself, defines in place of torch's."""
    mro = type(module).__mro__
    in_class = {name for cls in mro[: mro.index(standard)] for name in vars(cls)} & _used_by(standard)
    on_itself = vars(module).keys() & {*dir(standard)}
    return min((in_class | on_itself) - HARMLESS, default="")


def _used_by(standard: type[nn.Module]) -> set[str]:
    """What torch's forward may look up: methods, settings and parameters."""
    settings = {name for cls in standard.__mro__ for name in vars(cls).get("__annotations__", ())}
    return {*dir(standard), *STORED, *settings, *getattr(standard, "__constants__", ())}


def _hooks(module: nn.Module) -> bool:
    """Whether hooks run with the module, other than our own quantizer of its input."""
    before = [hook for hook in module._forward_pre_hooks.values() if not is_input_quantizer(hook)]
    return bool(before or module._forward_hooks)


def _stores_its_weight(module: nn.Module) -> bool:
    """Whether weight and bias are plain parameters of the module, where its class has such."""
    if any(name in vars(module) for name in STORED):
        return False
    stored = [module._parameters[name] for name in STORED if name in module._parameters]
    return all(parameter is None or _is_plain_parameter(parameter) for parameter in stored)


def _is_plain_parameter(parameter: Tensor) -> bool:
    """A subclass of Parameter or Tensor, such as a quantized one, may compute anything."""
    return type(parameter) is nn.Parameter and type(parameter.data) is Tensor
