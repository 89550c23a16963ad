"""Checkpoints that are quantized already: what was a layer's weight is packed into integers, with scales beside.

What is left in floating point of such a model is no model to plan for; embeddings and heads alone would look like one.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .errors import SourceError
from .roles import Config
from .tensor_files import StoredTensor

# GPTQ and AWQ; compressed-tensors; HQQ; quanto; Marlin; AQLM; bitsandbytes of 4 bits and of 8; torch's own.
PACKED = re.compile(
    r"\.(qweight|weight_packed|W_q|weight\._data|codebooks|weight\.absmax|weight\.quant_map|weight\.quant_state\..*|SCB)$"
    r"|(^|\.)_packed_params\."
)
BLOCKS = "_blocks"  # microscaling formats, as gpt-oss has them, with NAME_scales beside
INTEGERS = (torch.uint8, torch.int8, torch.qint8, torch.quint8)  # wider ones are indices, where nothing else says so


def refuse_packed(stored: Mapping[str, StoredTensor], config: Config, where: str) -> None:
    """Raise SourceError, naming a packed tensor and the method, for a checkpoint that is quantized already."""
    packed = [name for name, tensor in stored.items() if is_packed(name, tensor, stored)]
    if not packed:
        return
    more = f" and {len(packed) - 1} more tensors are" if len(packed) > 1 else " is"
    raise SourceError(
        f"{where}: quantized already{_method(config())}: {packed[0]!r}{more} of packed layers. Give the "
        "checkpoint in floating point that it was made of; or, to plan only what is left in floating point, "
        "--already-quantized (already_quantized=True)"
    )


def is_packed(name: str, tensor: StoredTensor, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether a tensor holds a quantized layer's codes, or what goes with them and with nothing else."""
    if PACKED.search(name):
        return True
    if tensor.foreign or tensor.dtype not in INTEGERS or len(tensor.shape) < 2:
        return False
    if name.endswith(BLOCKS):
        return f"{name.removesuffix(BLOCKS)}_scales" in stored
    return name == "weight" or name.endswith(".weight")


def _method(config: Mapping[str, Any]) -> str:
    said = config.get("quantization_config")
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    return f" by {method} (config.json)" if isinstance(method, str) else ""
