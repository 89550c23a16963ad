"""The names that GGUF files have: of transformers' layers, and of what llama.cpp never quantizes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ..common.checks import shown
from ..common.extras import how_to_install
from ..errors import SettingError
from ..plans.names import weight_name

KEPT = re.compile(
    r"_norm$|ffn_gate_(inp|tid2eid)$|(^|\.)(altup|laurel)_|per_layer_model_proj$|^position_embd$|^token_types$"
    r"|ssm_conv1d|shortconv\.conv$|indexer\.[kq]_proj$|attn_rel_b$|time_mix_(first|decay_w[12]|lerp_fused|[wva][012]|g[12])$"
    r"|\.position_embd|sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_(embd|merger)|a\.rvq\.codebook|mm\.a\.code_embd"
)
"""As llama-quantize looks for them: norms, routers, short convolutions, small tables and gates, positions, patches."""

EXPERT = re.compile(r"^(?P<stack>.*\bexperts)\.(?P<number>\d+)(?P<rest>\..+)$")
NUMBER_LAST = re.compile(r"^(?P<stack>.*\bexperts\..+)\.(?P<number>\d+)$")
BLOCK = re.compile(r"(^|\.)blk\.\d")
OUTSIDE = ("token_embd", "output", "per_layer_token_embd")  # of all blocks
OUTER = ("language_model.", "text_model.")
SPELLED = {"mixtral": "llama", "mistral": "llama", "gemma3_text": "gemma3", "gemma3n_text": "gemma3n"}
"""Model types of transformers that GGUF calls otherwise than without underscores."""


def kept_by_llama_cpp(layer: str) -> bool:
    """Whether llama-quantize leaves a layer of this name, without `.weight`, in floating point in silence."""
    return KEPT.search(layer) is not None


def of_gguf(names: Sequence[str]) -> bool:
    """Whether layers are called as in GGUF files, where blocks are called so and as nowhere else."""
    return any(BLOCK.search(name) for name in names) or all(name in OUTSIDE for name in names)


def mapped(names: Iterable[str], architecture: str | None, layers: int) -> dict[str, str]:
    """Layers of transformers -> what GGUF calls them, where they have a name there. Raises SettingError as _table."""
    table = _table(architecture, layers)
    return {name: mapped for name in names if (mapped := _one(name, table)) is not None}


def _one(name: str, table: Any) -> str | None:
    """A layer's name in a GGUF file; experts are one tensor there, NAME.0, NAME.1 ... of it."""
    for outer in OUTER:
        name = name.replace(f"model.{outer}", "model.").removeprefix(outer)
    expert = EXPERT.match(name) or NUMBER_LAST.match(name)
    if expert is not None:
        stack = expert["stack"] + expert.groupdict().get("rest", "")
        whole = _looked_up(stack, table)
        return None if whole is None else f"{whole}.{expert['number']}"
    return _looked_up(name, table)


def _looked_up(name: str, table: Any) -> str | None:
    found = table.get_name(weight_name(name), try_suffixes=(".weight",))
    return None if found is None else str(found).removesuffix(".weight")


def _table(architecture: str | None, layers: int) -> Any:
    """gguf's own map. Raises SettingError for an architecture that it does not know."""
    if find_spec("gguf") is None:
        raise SettingError(f"gguf is not installed, whose table of names is needed: {how_to_install('gguf')}")
    import gguf

    known: Mapping[str, Any] = {spelled: number for number, spelled in gguf.MODEL_ARCH_NAMES.items()}
    if not isinstance(architecture, str) or architecture not in known:
        raise SettingError(
            f"architecture: {shown(architecture)} is none of those that gguf has names for ({', '.join(sorted(known))})"
            "; plan the model's GGUF file itself, whose names need no table"
        )
    return gguf.get_tensor_name_map(known[architecture], layers)


def architecture_of(config: Mapping[str, Any]) -> tuple[str | None, int]:
    """What GGUF calls the architecture of a configuration of transformers, and how many blocks it has."""
    kind = config.get("model_type")
    count = config.get("num_hidden_layers", config.get("n_layer"))
    if not isinstance(kind, str):
        return None, 0
    return SPELLED.get(kind, kind.replace("_", "")), count if isinstance(count, int) else 0
