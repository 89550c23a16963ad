"""Layers that compute in their own way, measured by running them: nothing is known of them but what they do.

    S(b) = 1/N sum_n ||f(x_n; w) - f(x_n; w'_b)||^2          at the layer's own output f
    h_j  = 1/N sum_no (d f_o(x_n; w) / d w_j)^2              estimated by Hutchinson's probes, E (J' v)_j^2, v = +-1

For torch's own layers, which are linear in w, h is the second moment of the weight's input (moments.py). It spreads S
over channels, and says which weights count where ranges are fitted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from ..errors import SettingError
from ..models.running import call_model, own_copy, sample_count, seeded, with_first_input

PROBES = 16
SEED = 0

Seen = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


def squared_slopes(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """sum_no (d f_o / d w_j)^2 for one call, in the weight's shape, float32; all 1 where f has no slope."""
    weight = _weight(layer).detach().clone().requires_grad_()
    with torch.enable_grad():
        output = _outputs(layer, weight, args, kwargs)
        total = [leaf for leaf in output if leaf.requires_grad]
    generator = torch.Generator().manual_seed(SEED)
    squares = torch.zeros_like(weight, dtype=torch.float32)
    for _ in range(PROBES if total else 0):
        signs = [(torch.randint(0, 2, leaf.shape, generator=generator) * 2 - 1).to(leaf) for leaf in total]
        slope = _slope(total, weight, signs)
        squares += 0 if slope is None else slope.float().square() / PROBES
    _leave_as_it_was(layer, args, kwargs)
    return squares if squares.any() else torch.ones_like(squares)


def output_errors(
    model: nn.Module,
    users: Sequence[nn.Module],
    weights: Callable[[], Iterator[Tensor]],
    batches: Sequence[Any],
) -> list[float]:
    """S of one layer, for each of the weights that `weights()` gives, summed over the modules that use it."""
    sums: list[float] = []
    samples = 0

    def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        exact = _outputs(module, _weight(module), args, kwargs)
        distances = [_distance(exact, _outputs(module, weight, args, kwargs)) for weight in weights()]
        sums[:] = [a + b for a, b in zip(sums, distances, strict=True)] if sums else distances
        _leave_as_it_was(module, args, kwargs)

    with watching(users, seen):
        for batch in batches:
            with torch.no_grad():
                call_model(model, batch)
            samples += sample_count(batch)
    return [total / samples for total in sums]


def input_output_errors(
    layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: Iterable[Tensor]
) -> list[float]:
    """Sum ||f(x; w) - f(x'; w)||^2 of one call, for each x' that its first input is replaced by."""
    weight = _weight(layer)
    exact = _outputs(layer, weight, args, kwargs)
    distances = [_distance(exact, _outputs(layer, weight, *with_first_input(args, kwargs, x))) for x in inputs]
    _leave_as_it_was(layer, args, kwargs)
    return distances


def _leave_as_it_was(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """What a layer or its hooks keep of a call, for others to read, is of its own weight again, and has no graph."""
    with torch.no_grad():
        _outputs(layer, _weight(layer), args, kwargs)


def _slope(outputs: Sequence[Tensor], weight: Tensor, signs: Sequence[Tensor]) -> Tensor | None:
    try:
        return torch.autograd.grad(outputs, weight, signs, retain_graph=True, allow_unused=True)[0]
    except RuntimeError:  # an operation without a derivative: then it has no slope to go by
        return None


@contextmanager
def watching(modules: Sequence[nn.Module], seen: Seen) -> Iterator[None]:
    """Show each call of the modules to `seen`, but for the calls that it makes itself."""
    busy: list[bool] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if busy:
            return
        busy.append(True)
        try:
            seen(module, args, kwargs, output)
        finally:
            busy.clear()

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _outputs(layer: nn.Module, weight: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """What the layer gives with this weight: its floating tensors. A random layer draws the same each time."""
    with seeded(SEED):
        given = own_copy(dict(kwargs))
        output = functional_call(layer, {"weight": weight}, own_copy(args), given)
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not leaves:
        raise SettingError(f"{type(layer).__name__}: gives no floating tensor to measure an error at; skip the layer")
    return leaves


def _distance(exact: Sequence[Tensor], rough: Sequence[Tensor]) -> float:
    return sum(float((a.double() - b.double()).square().sum()) for a, b in zip(exact, rough, strict=True))
