"""Which tensors of a bare file are no layers though they have a layer's shape: by their names and their neighbours.

A module can be asked for its class. A file has names, and they have to do: a norm over several dimensions, a mask or
a running statistic may be called `.weight` too.
"""

import re
from collections.abc import Mapping, Sequence

from ..plans.names import JOINED, are_experts, is_weight, layer_name
from .roles import is_head

NORM = re.compile(r"\w*(layer|batch|group|instance|rms|sync)?norms?\d*|(ln|bn|gn)s?\d*", re.IGNORECASE)
BUFFER = re.compile(r"masks?|anchors?|grids?|means?|vars?|std|freqs?|priors?|queue|strides?|ema|ids|index|indices")
WORKS = re.compile(r"proj(ection)?|linear|lin|fc\d*|dense|conv\d*d?|mlp|embed(ding)?s?|head")
TABLE = re.compile(r"(^|_)(relative_)?(pos(ition)?|coords?)_(bias|index|table|buffer|encodings?)(_table)?$|(^|_)pe$")
EMBEDDING = re.compile(r"(^|_)(embed\w*|embd$)|\w*embeddings?(_|$)|^(wte|wpe|shared)$")


def why_no_layer(parameter: str, shape: Sequence[int], shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Why a tensor of two or more dimensions is no layer's weight, in words; None for one that seems to be."""
    if are_experts(parameter, shape):
        return None
    if JOINED.search(parameter):
        return "experts in one matrix, and no router of as many outputs beside them says how many"
    if not is_weight(parameter):
        return "its name does not end in .weight"
    name = layer_name(parameter)
    bias = shapes.get(f"{name}.bias" if name else "bias")
    if bias is not None and len(bias) >= 2:
        return "its bias has several dimensions, as a norm's"
    words = _words(name)
    if bias is not None or any(WORKS.fullmatch(word) for word in words):
        return None
    if any(NORM.fullmatch(word) for word in words):
        return "a norm, by its name"
    if any(BUFFER.fullmatch(word) for word in words) or TABLE.search(name.rpartition(".")[2]):
        return "a table or a buffer, by its name"
    return None


def is_embedding(name: str, shape: Sequence[int], shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a matrix is looked up, and not multiplied by: its name says so, and it has no bias."""
    last = name.rpartition(".")[2]
    if len(shape) != 2 or EMBEDDING.search(last) is None or f"{name}.bias" in shapes:
        return False
    return not is_head(name) and not {"proj", "projection", "linear", "out"} & set(last.split("_"))


def _words(name: str) -> list[str]:
    """Of the last part of a name, or of the list it is in: `post_attention_layernorm` as post, attention, layernorm."""
    parts = name.split(".")
    last = parts[-2] if len(parts) > 1 and parts[-1].isdigit() and parts[-2].endswith("s") else parts[-1]
    return [word for word in last.split("_") if word and not word.isdigit()]
