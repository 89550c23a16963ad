"""What layers of a language model are, by the names and the configuration that transformers checkpoints have.

Norms and biases are no layers (not_layers.py); embeddings, output heads and routers can be left alone by name of their
role; low-rank adapters, and small tables and gates, are left alone by default where a bare file has them; a tensor of
stacked experts is a layer for each expert.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import translate
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.gguf_files import gguf_configuration
from ..checkpoints.gguf_header import is_gguf
from ..common.checks import as_integer
from ..common.documents import LARGEST_DOCUMENT
from ..common.files import read_regular
from ..errors import SettingError, SourceError
from ..plans.names import EXPERTS, JOINED, NUMBERED
from .gguf_names import kept_by_llama_cpp

if TYPE_CHECKING:
    from .handles import Weight

Config = Callable[[], Mapping[str, Any]]
"""The checkpoint's configuration, read when it is asked for: most plans need none."""

PREFIX = "role:"
EMBEDDINGS, HEAD, ROUTERS, LORA, FRAGILE = ROLES = ("embeddings", "lm_head", "routers", "lora", "fragile")
BY_DEFAULT = {
    LORA: "a low-rank adapter beside the weights; merge it into them, or take it with --only",
    FRAGILE: "a small table or gate, which inference engines keep in floating point; take it with --only",
}
"""Roles that a checkpoint's plan leaves alone unless `only` names them, and why."""
HEAD_NAMES = (
    "lm_head", "*.lm_head", "embed_out", "*.embed_out", "output", "head", "*.output_layer", "*.predictions.decoder",
    "*.output_projection", "proj_out", "unembed", "*.unembed",
)  # fmt: skip
INPUT_EMBEDDINGS = (
    "*embed_tokens", "*wte", "*word_embeddings", "*embed_in", "*tok_embeddings", "shared", "*.shared", "*.embeddings",
    "token_embd",
)  # fmt: skip
ROUTER_NAMES = ("*.gate", "*.router", "*.router.*", "*.wg", "*_expert_gate", "*.ffn_gate_inp")
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Projections out of and back into the hidden state, by the last words of their names.
READS_HIDDEN = re.compile(r"(gate|up|w1|w3|wi|fc1|input)")
WRITES_HIDDEN = re.compile(r"(down|w2|wo|fc2|output)")
LORA_NAMES = re.compile(r"(^|\.)lora(_\w+)?(\.|$)")
# Gemma 3n's (some are 4 x 4), T5's and DeBERTa's biases of relative positions, Qwen3-Next's pairs of gates.
SMALL = re.compile(
    r"(^|\.)(altup|laurel)\.|(^|\.)(modality_router|in_proj_(ba|a|b)|rel(ative)?_(attention|attn|position|pos)_?\w*"
    r"|rel_embeddings)$"
)
VISION = re.compile(r"(^|[._])(vision|visual|image|img|vit|clip|siglip)\w*\.")
POSITIONS = re.compile(r"(^|\.)(pos(ition(al)?)?_?(embed(ding)?s?|emb)|embed_positions)$")
LONGEST_SHORT_CONV = 8
# Whose layers are transformers' Conv1D, which keeps (inputs, outputs): model types, and what such layers are called.
CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
# Whose stacked experts are (inputs, outputs), as F.linear does not take them: transformers' model types.
INPUTS_FIRST = ("llama4", "llama4_text", "gpt_oss", "qwen3_vl_moe", "qwen3_vl_moe_text")


def read_config(path: Path) -> Mapping[str, Any]:
    """The config.json of a checkpoint's directory, its text model's part first; {} where there is none.

    Raises SourceError for one that is damaged.
    """
    if path.is_file() and is_gguf(path):
        return gguf_configuration(path)
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
    if role in BY_DEFAULT:
        return {name for name, its_role in left_by_default(weights).items() if its_role == role}
    heads = {weight.name for weight in weights if _named(weight, HEAD_NAMES)}
    if not _ties_its_head(config(), bool(heads)):
        return heads
    return heads | {weight.name for weight in weights if _named(weight, INPUT_EMBEDDINGS)}


def left_by_default(weights: Sequence["Weight"]) -> dict[str, str]:
    """Layer -> its role, of those that are left alone unless they are asked for."""
    names = {name for weight in weights for name in weight.names}
    by_layer: dict[str, str] = {}
    for weight in weights:
        if any(LORA_NAMES.search(name) for name in weight.names):
            by_layer[weight.name] = LORA
        elif any(_is_fragile(name, weight.shape, names) for name in weight.names):
            by_layer[weight.name] = FRAGILE
    return by_layer


def _is_fragile(name: str, shape: Sequence[int], names: set[str]) -> bool:
    if kept_by_llama_cpp(name):
        return True
    if name.endswith("_expert_gate"):
        return shape[0] == 1
    if VISION.search(name) and POSITIONS.search(name):
        return True
    return SMALL.search(name) is not None or _is_short_convolution(name, shape, names)


def _is_short_convolution(name: str, shape: Sequence[int], names: set[str]) -> bool:
    """A few steps of each channel's own, beside projections: what state-space and linear attention layers have."""
    if len(shape) != 3 or shape[1] != 1 or shape[2] > LONGEST_SHORT_CONV:
        return False
    block, _, last = name.rpartition(".")
    beside = ("in_proj", "out_proj", "q_proj", "in_proj_qkvz", "in_proj_qkv", "linear_out")
    return "conv" in last and any(f"{block}.{neighbour}" in names for neighbour in beside)


def keeps_inputs_first(name: str, shape: Sequence[int], shapes: Mapping[str, Sequence[int]], config: Config) -> bool:
    """Whether a matrix is (inputs, outputs), as transformers' Conv1D keeps it, not (outputs, inputs).

    Its bias says so, for that has a value for each output; or the model's type and the layer's name.
    """
    bias = shapes.get(f"{name}.bias" if name else "bias")
    if len(shape) != 2 or (bias is not None and len(bias) != 1):
        return False
    if bias is not None and shape[0] != shape[1] and bias[0] in shape:
        return bias[0] == shape[1]
    if name.rpartition(".")[2] not in CONV1D_NAMES:
        return False
    return config().get("model_type") in CONV1D_TYPES or _others_keep_inputs_first(shapes)


def _others_keep_inputs_first(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether biases say so of other layers that are called as Conv1D's."""
    for parameter, shape in shapes.items():
        name = parameter.removesuffix(".weight")
        bias = shapes.get(f"{name}.bias")
        named = name.rpartition(".")[2] in CONV1D_NAMES and len(shape) == 2 and shape[0] != shape[1]
        if named and bias is not None and tuple(bias) == (shape[1],):
            return True
    return False


def tied_by_configuration(shapes: Mapping[str, Sequence[int]], config: Config) -> tuple[str, ...]:
    """Parameters that the configuration ties where they are stored apart: the head and the input embedding.

    Only those of one shape; whether their values are the same is for the caller to see.
    """
    heads = [p for p in shapes if _is_named(p.removesuffix(".weight"), HEAD_NAMES)]
    inputs = [p for p in shapes if _is_named(p.removesuffix(".weight"), INPUT_EMBEDDINGS)]
    alike = [p for p in dict.fromkeys([*inputs, *heads]) if p.endswith(".weight") and len(shapes[p]) == 2]
    if not any(tuple(shapes[h]) == tuple(shapes[i]) for h in heads for i in inputs if h != i):
        return ()
    return tuple(alike) if _ties_its_head(config(), stored=False) else ()


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


def inputs_first(parameter: str, shape: Sequence[int], hidden: int | None, config: Mapping[str, Any]) -> bool:
    """Whether the matrices of stacked experts (experts, ., .) are (inputs, outputs), not F.linear's (outputs, inputs).

    By which side is as wide as the hidden state; where both or neither are, by the model's type. DBRX's second matrices
    are, by their name.
    """
    joined = JOINED.search(parameter)
    if joined is not None:
        return joined[2] == "w2"
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
        if len(shape) == 2 and _is_named(name, INPUT_EMBEDDINGS):
            return shape[1]
    return None


def is_head(name: str) -> bool:
    """Whether a layer is called as output heads are."""
    return _is_named(name, HEAD_NAMES)


def _is_named(name: str, patterns: tuple[str, ...]) -> bool:
    return _either(patterns).match(name) is not None


@cache
def _either(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """All of the globs as one expression: checkpoints have a hundred thousand names."""
    return re.compile("|".join(map(translate, patterns)))


def _named(weight: "Weight", patterns: tuple[str, ...]) -> bool:
    return any(_is_named(name, patterns) for name in weight.names)


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
