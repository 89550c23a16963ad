"""Where a torch checkpoint keeps its weights: which of the mappings in it, and which of several."""

import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.text import first_few
from ..errors import SourceError
from ..models.wrappers import without_holders
from ..plans.names import are_experts, is_weight

# Where training scripts put the weights, most specific first.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "weights", "params")
TOP = "."
OPTIMIZERS = re.compile(r"optim|^opt(_|$)|^exp_avg|momentum_buffer")  # keys of what is no model's
DEEPEST = 16  # of mappings in one another


@dataclass(frozen=True)
class StateDict:
    """One set of weights: the mapping itself, and the keys that lead to it, joined by dots (`.` for the top).

    It is the checkpoint's own mapping, so that replacing a tensor in it replaces the checkpoint's.
    """

    key: str
    state: MutableMapping[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What of it is a tensor, by name."""
        return {
            name: value for name, value in self.state.items() if isinstance(name, str) and isinstance(value, Tensor)
        }


def chosen_state_dict(content: Any, path: Path, weights: str | None = None, *, prefer: str | None = None) -> StateDict:
    """The weights of a torch checkpoint's content: those under the key `weights`, or the only ones there.

    prefer: the key to take, if it is there, where `weights` says nothing. What optimizers keep is no weights, and a
    tensor or a number beside mappings does not make the top of a file one. One of the usual keys is taken before
    others, unless their layers have the same names, as averaged weights do. Raises SourceError, listing the keys.
    """
    if not isinstance(content, MutableMapping | list | tuple):
        raise SourceError(f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict()")
    everything = {
        candidates.key: candidates for candidates in _walk(content, TOP, DEEPEST, set()) if candidates.tensors
    }
    wanted = weights if weights is not None else prefer if prefer in everything else None
    if wanted is not None:
        if wanted not in everything:
            raise SourceError(f"{path}: weights: there are none under {wanted!r}; {_listed(everything)}")
        return everything[wanted]
    candidates = {key: held for key, held in everything.items() if _layer_names(held)} or everything
    if not candidates:
        raise SourceError(
            f"{path}: holds {_instead(content)}; the weights are expected at the top or under {STATE_KEYS[0]!r}"
        )
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    return _usual(candidates, path)


def find_state_dict(content: Any, path: Path, weights: str | None = None) -> MutableMapping[str, Any]:
    """The mapping that chosen_state_dict chooses. Raises SourceError."""
    return chosen_state_dict(content, path, weights).state


def beside(content: Any, chosen: StateDict) -> tuple[str, ...]:
    """Keys of what a checkpoint holds beside the tensors of the chosen state dict: those on the way to it, then its."""
    if content is chosen.state:
        return tuple(str(key) for key in chosen.state if key not in chosen.tensors)
    keys: list[str] = []
    inner: list[str] = []
    for key, value in _items(content):
        if value is chosen.state or chosen.key.startswith(f"{key}."):
            way = StateDict(chosen.key.removeprefix(f"{key}."), chosen.state)
            inner += [f"{key}.{name}" for name in beside(value, way)]
        else:
            keys.append(str(key))
    return (*keys, *inner)


def _usual(candidates: Mapping[str, StateDict], path: Path) -> StateDict:
    """The one that is where weights usually are. Raises SourceError where that may not be the one that is meant."""
    ranked = sorted((rank, key) for key in candidates if (rank := _rank(key)) is not None)
    if ranked:
        chosen = candidates[ranked[0][1]]
        layers = _layer_names(chosen)
        twins = [key for key, other in candidates.items() if other is not chosen and layers & _layer_names(other)]
        if not twins:
            return chosen
        candidates = {key: candidates[key] for key in (chosen.key, *twins)}
        same = " whose layers have the same names"
    else:
        same = ""
    keys, example = first_few([repr(key) for key in candidates], ", "), list(candidates)[-1]
    raise SourceError(
        f"{path}: holds several state dicts{same}: {keys}. Say which is meant: "
        f"weights={example!r}, or --weights {example} on the command line"
    )


def _rank(key: str) -> tuple[int, ...] | None:
    """How usual a place is, less being more; None for one that is not."""
    if key == TOP:
        return (len(STATE_KEYS),)
    words = key.split(".")
    return tuple(STATE_KEYS.index(word) for word in words) if all(word in STATE_KEYS for word in words) else None


def _layer_names(held: StateDict) -> set[str]:
    """Its tensors that could be layers' weights, without what wraps the model."""
    names = [
        name
        for name, tensor in held.tensors.items()
        if tensor.dim() >= 2 and (is_weight(name) or are_experts(name, tensor.shape))
    ]
    return set(without_holders(names).values())


def _walk(value: Any, key: str, depth: int, seen: set[int]) -> Iterator[StateDict]:
    """Every mapping with names in it, but for what optimizers keep."""
    if id(value) in seen or not depth:
        return
    seen.add(id(value))
    if _is_optimizers(value):
        return
    if isinstance(value, MutableMapping):
        yield StateDict(key, value)
    for name, inner in _items(value):
        if isinstance(inner, Mapping | list | tuple) and not OPTIMIZERS.search(str(name).lower()):
            yield from _walk(inner, _joined("" if key == TOP else key, str(name)), depth - 1, seen)


def _is_optimizers(value: Any) -> bool:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()


def _instead(content: Any) -> str:
    """What there is where no weights are: tensors in lists have no names, and those of optimizers are no weights."""
    waiting, seen, tensors, optimizers = [content], set[int](), False, False
    while waiting:
        value = waiting.pop()
        tensors |= isinstance(value, Tensor)
        optimizers |= _is_optimizers(value)
        if id(value) not in seen:
            seen.add(id(value))
            waiting += [inner for _, inner in _items(value)]
    if optimizers:
        return "what an optimizer keeps, and no weights"
    return "tensors without names, or none that are a model's" if tensors else "no tensors"


def _items(value: Any) -> list[tuple[object, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else []


def _joined(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _listed(everything: Mapping[str, StateDict]) -> str:
    keys = first_few([repr(key) for key in everything], ", ")
    return f"there are sets of tensors under {keys}" if everything else "it holds no tensors"
