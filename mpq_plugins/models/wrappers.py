"""Names without what wraps a model: DataParallel, torch.compile, FSDP and trainers put words before them.

A wrapper makes no other model. So a plan made with one fits the model under another, and under none.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

# No model of a user's has parts of these names: torch.compile, FSDP, activation checkpointing, Fabric put them there,
# before all names or before a part's.
UNMISTAKABLE = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module"}
)
PARALLEL = "module"  # DataParallel's word, and that of averaged models
# What trainers call the model they hold. A user's own model may have such a part, so names keep the word.
HOLDERS = (PARALLEL, "model", "net", "network")

Naming = Callable[[Sequence[str]], dict[str, str]]
"""What a set of names becomes: name -> the same without some words."""


def bare_names(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """What a checkpoint calls its tensors -> what its model does: without `_orig_mod.`, and `module.` before all.

    A single number beside them, such as a count of averaged models, has no say in what is before all. Where two
    tensors would be called the same, all keep their names.
    """
    cleaned = {name: _cleaned(name) for name in shapes}
    prefix = _before_all([cleaned[name] for name, shape in shapes.items() if len(shape)], (PARALLEL,))
    bare = {name: cleaned_name.removeprefix(prefix) for name, cleaned_name in cleaned.items()}
    return bare if len(set(bare.values())) == len(bare) else {name: name for name in shapes}


def without_holders(names: Sequence[str]) -> dict[str, str]:
    """Names without wrappers, and without the words that trainers put before all of them."""
    cleaned = {name: _cleaned(name) for name in names}
    prefix = _before_all(list(cleaned.values()), HOLDERS)
    return {name: f"{cleaned_name}.".removeprefix(prefix).removesuffix(".") for name, cleaned_name in cleaned.items()}


def renaming(layers: Iterable[Sequence[str]], others: Iterable[str], present: Iterable[str]) -> dict[str, str]:
    """How a plan's names are called by a model that is wrapped otherwise: planned name -> the one that is present.

    layers: the names of each planned layer, of which one must be found; others: names to translate where they are
    found. Names that are there as they are come first, then those that differ in fewer words. {} where the names are
    not those of one model.
    """
    groups, there = list(layers), list(present)
    planned = list(dict.fromkeys([name for group in groups for name in group] + list(others)))
    for naming in _NAMINGS:
        keys, here = naming(planned), {key: name for name, key in naming(there).items()}
        apart = len(set(keys.values())) == len(keys) and len(here) == len(set(there))
        if apart and all(any(keys[name] in here for name in group) for group in groups):
            return {name: here[keys[name]] for name in planned if keys[name] in here}
    return _in_the_held_model(groups, planned, there)


def _in_the_held_model(groups: Sequence[Sequence[str]], planned: Sequence[str], there: Sequence[str]) -> dict[str, str]:
    """How names are called where a trainer holds other modules beside the model; {} where two parts could be it."""
    keys = without_holders(planned)
    fits: dict[str, dict[str, str]] = {}
    for first in dict.fromkeys(_cleaned(name).partition(".")[0] for name in there):
        rest = {
            name: _cleaned(name).removeprefix(f"{first}.") for name in there if _cleaned(name).startswith(f"{first}.")
        }
        inner = without_holders(list(rest.values()))
        present = {inner[own_name]: name for name, own_name in rest.items()}
        if len(present) == len(rest) and all(any(keys[name] in present for name in group) for group in groups):
            fits[first] = {name: present[keys[name]] for name in planned if keys[name] in present}
    ((first, fit),) = fits.items() if len(fits) == 1 else [("", {})]
    return fit if first in HOLDERS else {}


def _cleaned(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in UNMISTAKABLE)


def _before_all(names: Sequence[str], words: Sequence[str]) -> str:
    """Words that all of the names begin with, as often as they do, with a dot after each."""
    prefix = ""
    while names:
        longer = next((f"{prefix}{w}." for w in words if all(f"{n}.".startswith(f"{prefix}{w}.") for n in names)), None)
        if longer is None:
            break
        prefix = longer
    return prefix


def _without_parallel(names: Sequence[str]) -> dict[str, str]:
    """DataParallel may hold a part of a model alone, in the middle of a name."""
    parts = {name: ".".join(word for word in name.split(".") if word != PARALLEL) for name in names}
    inner = without_holders(list(parts.values()))
    return {name: inner[key] for name, key in parts.items()}


_NAMINGS: tuple[Naming, ...] = (
    lambda names: {name: name for name in names},
    lambda names: {name: _cleaned(name) for name in names},
    without_holders,
    _without_parallel,
)
