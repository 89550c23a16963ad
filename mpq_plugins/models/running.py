"""A user's calibration inputs, and how a model is run on them."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..common.text import what_it_said
from ..errors import SettingError
from .autocast import forget_casts


def checked_batches(batches: Iterable[Any], name: str = "batches") -> list[Any]:
    """The batches as a list. Raises SettingError for none, or where they are no series of inputs."""
    if isinstance(batches, Tensor):
        raise SettingError(
            f"{name}: a single tensor is one batch; give a list of batches, [inputs] or inputs.split(64)"
        )
    if isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
        raise SettingError(f"{name}: {type(batches).__name__} is no series of inputs; give a list of batches")
    series = list(batches)
    if not series:
        raise SettingError(f"{name}: none given; a list of the model's inputs")
    return series


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Where the caller is in torch.inference_mode, which has no gradients and cannot be asked for any."""
    grad = torch.is_grad_enabled()
    with torch.inference_mode(mode=False), torch.set_grad_enabled(grad):
        yield


def run_model(model: nn.Module, batch: Any) -> Any:
    """The model's output in evaluation mode, without gradients. Raises SettingError where it does not run on it."""
    with evaluating(model), torch.no_grad():
        return call_model(model, batch)


def call_model(model: nn.Module, batch: Any, passing: tuple[type[Exception], ...] = ()) -> Any:
    """The model's output: a mapping gives keyword arguments, a tuple or list arguments, anything else one argument.

    passing: what else may be raised inside to end the run. Raises SettingError where the model does not run on it.
    """
    given = own_copy(batch)
    forget_casts()
    try:
        if isinstance(given, dict):
            return model(**given)
        return model(*given) if isinstance(given, tuple | list) else model(given)
    except Exception as error:  # a user's forward may raise anything on a wrong input
        if isinstance(error, (SettingError, *passing)):
            raise
        raise SettingError(
            f"batches: {type(model).__name__} does not run on a batch of {_shapes(given)} ({what_it_said(error)}). A "
            "batch is the inputs alone, without labels: a tensor, or a tuple or mapping of arguments"
        ) from error


def _shapes(batch: Any) -> str:
    """The shapes of a batch's tensors, and the types of what else is in it."""
    if isinstance(batch, dict):
        return ", ".join(f"{name}: {_shapes(value)}" for name, value in batch.items())
    if isinstance(batch, tuple | list):
        return f"({', '.join(map(_shapes, batch))})"
    return str(tuple(batch.shape)) if isinstance(batch, Tensor) else type(batch).__name__


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without torch's fused attention, which calls none of the layers it is made of."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _WITHOUT_FAST_PATH:
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


class _WithoutFastPath:
    """Fused attention is off, for all of the process, from the first thread's entry to the last one's exit."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.mha.set_fastpath_enabled(self._before)


_WITHOUT_FAST_PATH = _WithoutFastPath()
_ONE_SEEDS = threading.RLock()


@contextmanager
def seeded(seed: int) -> Iterator[torch.Generator]:
    """Give a generator of one's own. torch's, which a model's forward may draw from, is seeded too and put back after.

    That one is the process's: two that seed it would draw from one another's numbers, so the second waits.
    """
    with _ONE_SEEDS, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def own_copy(batch: Any) -> Any:
    """The batch in tensors of its own, for a forward may change its inputs in place; any mapping as a dict.

    A tensor that takes gradients is left as it is.
    """
    plain = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and not leaf.requires_grad else leaf, plain)


def sample_count(batch: Any) -> int:
    """How many samples a batch holds: the largest first dimension of its matrices and more, nested ones included."""
    plain = dict(batch) if isinstance(batch, Mapping) else batch
    tensors = [leaf for leaf in tree_leaves(plain) if isinstance(leaf, Tensor) and leaf.dim()]
    several = [tensor for tensor in tensors if tensor.dim() > 1] or tensors
    return max((len(tensor) for tensor in several), default=1)


def one_sample(batch: Any, k: int) -> Any:
    """The k-th sample of a batch, as a batch of one; what does not have the batch's first dimension stays whole."""
    count = sample_count(batch)
    plain = dict(batch) if isinstance(batch, Mapping) else batch

    def cut(leaf: Any) -> Any:
        return leaf[k : k + 1] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count else leaf

    return tree_map(cut, plain)


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A module's own input, given by position or by name."""
    return args[0] if args else next(iter(kwargs.values()), None)


def with_first_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's arguments with another input in the place of its own."""
    if args:
        return (value, *args[1:]), dict(kwargs)
    name = next(iter(kwargs))
    return args, {**kwargs, name: value}
