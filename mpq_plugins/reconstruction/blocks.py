"""Which modules are reconstructed together: residual blocks, transformer layers, and the layers in none of them."""

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from ..common.patterns import matches
from ..common.text import first_few
from ..errors import SettingError
from ..models.kinds import layer_kind
from ..plans.plan import Plan

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def learned_layers(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The planned layers whose rounding is learned: the first user of each weight, embeddings and float layers aside.

    A weight that an embedding shares is rounded to nearest as the embedding's.
    """
    choices = plan.by_any_name
    users = [(name, module) for name, module in model.named_modules() if layer_kind(module) and name in choices]
    embedded = {id(module.weight) for _, module in users if isinstance(module, nn.Embedding)}
    layers: dict[str, nn.Module] = {}
    seen = set(embedded)
    for name, module in users:
        if id(module.weight) not in seen and not choices[name].in_float:
            seen.add(id(module.weight))
            layers[name] = module
    return layers


def find_units(model: nn.Module, layers: Sequence[str], patterns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Blocks and the layers in none, each with the layers in it, in the model's order.

    patterns: globs or `re:` expressions on module names. Raises SettingError for one that matches no module that holds
    a layer whose rounding is learned.
    """
    blocks = _matched(model, layers, patterns) if patterns else default_blocks(model, layers)
    units: dict[str, list[str]] = {}
    for layer in layers:
        unit = next((block for block in blocks if _inside(layer, block) or layer == block), layer)
        units.setdefault(unit, []).append(layer)
    return {name: tuple(members) for name, members in units.items()}


def default_blocks(model: nn.Module, layers: Sequence[str]) -> tuple[str, ...]:
    """The innermost modules in a list that hold two layers or more; then siblings of one class that do, the outermost.

    Lists are Sequential, ModuleList and ModuleDict. They are no blocks themselves, for their parts are.
    """
    modules = dict(model.named_modules())
    counts = {name: sum(_inside(layer, name) for layer in layers) for name in modules}
    several = [name for name in modules if name and counts[name] > 1 and not isinstance(modules[name], CONTAINERS)]
    listed = [name for name in several if isinstance(modules[_parent(name)], CONTAINERS)]
    innermost = [name for name in listed if not any(_inside(other, name) for other in listed)]
    free = [name for name in several if not any(_overlap(name, block) for block in innermost)]
    kinds = [(_parent(name), type(modules[name])) for name in free]
    siblings = [name for name, kind in zip(free, kinds, strict=True) if kinds.count(kind) > 1]
    outermost = [name for name in siblings if not any(_inside(name, other) for other in siblings)]
    return (*innermost, *outermost)


def _matched(model: nn.Module, layers: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    # Lists are not called themselves.
    called = [name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList | nn.ModuleDict)]
    candidates = [name for name in called if _holds(name, layers) and (name or not layers[0])]
    unmatched = [repr(glob) for glob in patterns if not any(matches(glob, name) for name in candidates)]
    if unmatched:
        raise SettingError(
            f"blocks: {first_few(unmatched, ', ')} match no module with a rounding to learn; such are "
            f"{first_few([repr(name) for name in candidates], ', ')}"
        )
    matched = [name for name in candidates if any(matches(glob, name) for glob in patterns)]
    return tuple(name for name in matched if not any(_inside(name, other) for other in matched))


def in_call_order(units: Mapping[str, tuple[str, ...]], called: Sequence[str]) -> Iterator[str]:
    """The units in the order the model first calls them. Raises SettingError for those that it does not."""
    missing = [repr(name) for name in units if name not in called]
    if missing:
        raise SettingError(
            f"{first_few(missing, ', ')}: no batch reaches it, or it is used without being called, so its inputs "
            "cannot be captured: give batches that reach it, name blocks around it (blocks=), or leave it out of the "
            "plan"
        )
    yield from called


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _inside(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.") if outer else bool(name)


def _overlap(one: str, other: str) -> bool:
    return one == other or _inside(one, other) or _inside(other, one)


def _holds(name: str, layers: Sequence[str]) -> bool:
    return any(layer == name or _inside(layer, name) for layer in layers)
