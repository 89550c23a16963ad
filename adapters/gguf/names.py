"""A plan by the names that GGUF files have: its own, or those that gguf maps from transformers' names."""

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mpq_plugins.common.extras import how_to_install
from mpq_plugins.common.text import first_few
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.names import weight_name
from mpq_plugins.plans.plan import Plan
from mpq_plugins.weights.roles import read_config

EXPERT = re.compile(r"^(?P<stack>.*\bexperts)\.(?P<number>\d+)(?P<rest>\..+)$")
NUMBER_LAST = re.compile(r"^(?P<stack>.*\bexperts\..+)\.(?P<number>\d+)$")
BLOCK = re.compile(r"(^|\.)blk\.\d")
OUTSIDE = ("token_embd", "output", "per_layer_token_embd")  # of all blocks
OUTER = ("language_model.", "text_model.")
SPELLED = {"mixtral": "llama", "mistral": "llama", "gemma3_text": "gemma3", "gemma3n_text": "gemma3n"}
"""Model types of transformers that GGUF calls otherwise than without underscores."""


def of_gguf(names: Sequence[str]) -> bool:
    """Whether layers are called as in GGUF files, where blocks are called so and as nowhere else."""
    return any(BLOCK.search(name) for name in names) or all(name in OUTSIDE for name in names)


def renamed(plan: Plan, architecture: str | None, layers: int) -> Plan:
    """The plan by GGUF's names, itself where it has them.

    Raises SettingError, naming them, for layers that have no name there.
    """
    names = [name for layer in plan.layers for name in layer.names]
    if of_gguf(names):
        return plan
    found = _mapped(names, architecture, layers)
    unknown = [name for name in names if name not in found]
    if unknown:
        raise SettingError(
            f"layer {unknown[0]!r}, one of {len(unknown)} such, has no name in GGUF files of {architecture!r}"
            f"{': ' + first_few(unknown, ', ') if len(unknown) > 1 else ''}. Skip it (--skip {unknown[0]!r}), or plan "
            "the model's GGUF file itself"
        )
    # What is left in float need not be in the file under any name.
    skipped = _mapped(plan.skipped, architecture, layers)
    kept = tuple(name for name in plan.skipped if name in skipped)
    return plan.model_copy(update={"skipped": kept, "left_alone": ()}).renamed(found | skipped)


def _mapped(names: Iterable[str], architecture: str | None, layers: int) -> dict[str, str]:
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
    if architecture is None or architecture not in known:
        raise SettingError(
            f"architecture: {architecture!r:.60} is none of those that gguf has names for ({', '.join(sorted(known))})"
            "; plan the model's GGUF file itself, whose names need no table"
        )
    return gguf.get_tensor_name_map(known[architecture], layers)


def architecture_of(directory: Path) -> tuple[str | None, int]:
    """What GGUF calls the architecture of a checkpoint of transformers, and how many blocks it has."""
    config = read_config(directory)
    kind = config.get("model_type")
    count = config.get("num_hidden_layers", config.get("n_layer"))
    if not isinstance(kind, str):
        return None, 0
    return SPELLED.get(kind, kind.replace("_", "")), count if isinstance(count, int) else 0
