"""Which layers can be compensated, which modules use their weights, and what is known of their further calls."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.kinds import layer_kind
from ..models.plain import why_not_plain
from ..models.running import first_input, run_model
from .gram import Gram
from .round_layer import later_gram
from .settings import Compensation
from .stations import Stations

EMBEDDING, SHARED = "it is an embedding", "it shares an embedding's weight"


def why_to_nearest(module: nn.Module) -> str:
    """Why a layer's formula does not hold; empty where it does."""
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if module.weight.dtype != torch.float32:
        return f"{module.weight.dtype} cannot hold compensated weights exactly; use model.float()"
    return why_not_plain(module)


def users_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """Layer -> all modules that have its weight, which it comes first among."""
    owners = {id(module.weight): name for name, module in layers.items()}
    users: dict[str, list[str]] = {name: [] for name in layers}
    for name, module in model.named_modules():
        owner = owners.get(id(getattr(module, "weight", None)))
        if owner is not None and layer_kind(module) is not None:
            users[owner].append(name)
    return {name: tuple(of_layer) for name, of_layer in users.items()}


def later_calls(
    exact: nn.Module, layers: Mapping[str, nn.Module], users: Mapping[str, Sequence[str]], stations: Stations,
    batches: Sequence[Any], settings: Compensation,
) -> dict[str, Gram]:  # fmt: skip
    """Layers that are called several times: H of the calls after the first, from the float net."""
    several = [name for name in layers if sum(stations.calls.get(user, 0) for user in users[name]) > 1]
    seen: dict[str, list[tuple[nn.Module, Tensor]]] = {name: [] for name in several}
    calls = dict.fromkeys(several, 0)

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[name] += 1
        value = first_input(args, kwargs)
        if calls[name] > 1 and isinstance(value, Tensor) and value.numel():
            seen[name].append((module, value.detach().clone()))

    with ExitStack() as stack:
        for name in several:
            for user in users[name]:
                module = exact.get_submodule(user)
                stack.enter_context(module.register_forward_pre_hook(partial(hook, name), with_kwargs=True))
        for batch in batches if several else ():
            calls = dict.fromkeys(several, 0)
            run_model(exact, batch)
    return {
        name: later_gram(seen[name], settings.columns, generator_of(settings.seed, f"later {name}"))
        for name in seen
        if seen[name]
    }


def generator_of(seed: int, name: str) -> torch.Generator:
    """A layer's own, so that a run that goes on after others draws alike."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
