"""What layers of a language model are, by the names and the configuration that transformers checkpoints have.

Norms and biases are no layers (weights.py); embeddings, output heads and routers can be left alone by name of their
role; a tensor of stacked experts is a layer for each expert.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .documents import LARGEST_DOCUMENT
from .errors import SettingError, SourceError
from .files import read_regular
from .validation import as_integer

if TYPE_CHECKING:
    from .weights import Weight

Config = Callable[[], Mapping[str, Any]]
"""The checkpoint's configuration, read when it is asked for: most plans need none."""

PREFIX = "role:"
EMBEDDINGS, HEAD, ROUTERS = ROLES = ("embeddings", "lm_head", "routers")
HEAD_NAMES = (
    "lm_head", "*.lm_head", "embed_out", "*.embed_out", "output", "head", "*.output_layer", "*.predictions.decoder",
    "*.output_projection", "proj_out",
)  # fmt: skip
INPUT_EMBEDDINGS = (
    "*embed_tokens", "*wte", "*word_embeddings", "*embed_in", "*tok_embeddings", "shared", "*.shared", "*.embeddings",
)  # fmt: skip
ROUTER_NAMES = ("*.gate", "*.router", "*.router.*", "*.wg", "*_expert_gate")
EXPERTS = re.compile(r"(^|\.)((\w+_)?experts?|(\w+_)?moe)(?=\.|$)")
NUMBERED = re.compile(r"experts?\.([0-9]{1,9})\.")
NO_MATRICES = re.compile(r"(^|_)(scales?|scale_inv|bias|norm|zero_points?|zeros|lora_\w+)$")
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Projections out of and back into the hidden state, by the last words of their names.
READS_HIDDEN = re.compile(r"(gate|up|w1|w3|wi|fc1|input)")
WRITES_HIDDEN = re.compile(r"(down|w2|wo|fc2|output)")
# Whose stacked experts are (inputs, outputs), as F.linear does not take them: transformers' model types.
INPUTS_FIRST = ("llama4", "llama4_text", "gpt_oss", "qwen3_vl_moe", "qwen3_vl_moe_text")


def read_config(path: Path) -> Mapping[str, Any]:
    """The config.json of a checkpoint's directory, its text model's part first; {} where there is none.

    Raises SourceError for one that is damaged.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(read_regular(file, LARGEST_DOCUMENT))  # others' configurations may hold Infinity
        merged = {**config, **(config.get("text_config") or {})}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{file}: not a model's configuration ({error!r:.200}); repair or remove it") from error
    return merged


def in_role(role: str, weights: Sequence["Weight"], config: Config) -> set[str]:
    """Names of the layers that have the role, or none. Raises SettingError for a role there is not."""
    if role not in ROLES:
        raise SettingError(f"{PREFIX}{role}: no such role; {', '.join(PREFIX + known for known in ROLES)}")
    if role == EMBEDDINGS:
        return {weight.name for weight in weights if weight.kind == "embedding"}
    if role == ROUTERS:
        return _routers(weights, config)
    heads = {weight.name for weight in weights if _named(weight, HEAD_NAMES)}
    if not _ties_its_head(config(), bool(heads)):
        return heads
    return heads | {weight.name for weight in weights if _named(weight, INPUT_EMBEDDINGS)}


def _routers(weights: Sequence["Weight"], config: Config) -> set[str]:
    """One output for each expert, or a gate of one for shared ones."""
    names = [name for weight in weights for name in weight.names]
    numbers = [int(match[1]) for name in names if (match := NUMBERED.search(f"{name}."))]
    ends = [as_integer(name.rpartition(".")[2]) for name in names if EXPERTS.search(name)]
    numbers += [end for end in ends if end is not None]
    if not numbers:
        return set()
    outputs = {1, max(numbers) + 1, *(config().get(key) for key in COUNTS)}
    return {
        weight.name
        for weight in weights
        if _named(weight, ROUTER_NAMES) and weight.shape[0] in outputs and not NUMBERED.search(weight.name)
    }


def are_experts(parameter: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is a stack of experts' matrices, experts first: by its shape, its path and its own name."""
    if len(shape) != 3 or min(shape[1:]) < 2:
        return False
    path = parameter.removesuffix(".weight")
    return (
        EXPERTS.search(path) is not None
        and NUMBERED.search(f"{path}.") is None
        and NO_MATRICES.search(path.rpartition(".")[2]) is None
    )


def stacks_of(names: Iterable[str]) -> set[str]:
    """The stacks of experts that layers of these names, NAME.0, NAME.1 ..., may be matrices of."""
    return {name.rpartition(".")[0] for name in names if as_integer(name.rpartition(".")[2]) is not None}


def inputs_first(parameter: str, shape: Sequence[int], hidden: int | None, config: Mapping[str, Any]) -> bool:
    """Whether the matrices of stacked experts (experts, ., .) are (inputs, outputs), not F.linear's (outputs, inputs).

    By which side is as wide as the hidden state; where both or neither are, by the model's type.
    """
    first, second = shape[1:]
    last = parameter.removesuffix(".weight").rpartition(".")[2]
    if (first == hidden) != (second == hidden):
        if READS_HIDDEN.search(last):
            return first == hidden
        if WRITES_HIDDEN.search(last):
            return second == hidden
    return config.get("model_type") in INPUTS_FIRST


def hidden_size(shapes: Iterable[tuple[str, Sequence[int]]], config: Mapping[str, Any]) -> int | None:
    """Width of the hidden state: the configuration's, or an input embedding's."""
    for key in ("hidden_size", "d_model", "n_embd"):
        if isinstance(config.get(key), int):
            return int(config[key])
    for parameter, shape in shapes:
        name = parameter.removesuffix(".weight")
        if len(shape) == 2 and any(fnmatchcase(name, pattern) for pattern in INPUT_EMBEDDINGS):
            return shape[1]
    return None


def _named(weight: "Weight", patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in weight.names for pattern in patterns)


def _ties_its_head(config: Mapping[str, Any], stored: bool) -> bool:
    """Whether the input embedding is the output head too: as the configuration says, or by transformers' default."""
    said = config.get("tie_word_embeddings")
    if isinstance(said, bool):
        return said
    names = config.get("architectures")
    makes_text = any(
        word in str(name)
        for name in (names if isinstance(names, list) else ())
        for word in ("CausalLM", "LMHead", "ForConditionalGeneration", "MaskedLM")
    )
    return makes_text and not stored
