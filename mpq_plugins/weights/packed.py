"""Checkpoints that are quantized already: what was a layer's weight is packed into integers, with scales beside.

What is left in floating point of such a model is no model to plan for; embeddings and heads alone would look like one.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..checkpoints.readers import StoredTensor
from ..errors import SourceError
from ..plans.names import is_weight
from .roles import Config

# GPTQ and AWQ; compressed-tensors; HQQ; quanto; AQLM; ExLlama's second and third; QuIP#; SpQR; bitsandbytes of 4 bits
# and of 8; torch's own.
PACKED = re.compile(
    r"\.(qweight|weight_packed|W_q|weight\._data|codebooks|q_weight|trellis|Qidxs|dense_weights"
    r"|weight\.absmax|weight\.quant_map|weight\.quant_state\..*|SCB)$"
    r"|(^|\.)_packed_params(\.|$)"
)
# How codes' names end, and in what place of that what goes with them does: MLX and HIGGS; VPTQ; Marlin; microscaling
# formats, as gpt-oss has them.
BESIDE: Mapping[str, tuple[str, ...]] = {
    ".weight": (".scales", ".scale", ".weight_scale", ".weight_scales"),
    ".indices": (".centroids.weight",),
    ".B": (".s",),
    "_blocks": ("_scales",),
}
OF_A_BYTE = (torch.uint8, torch.int8, torch.qint8, torch.quint8)  # wider ones are indices, where nothing else says so
INTEGERS = (*OF_A_BYTE, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def refuse_packed(stored: Mapping[str, StoredTensor], beside: Iterable[str], config: Config, where: str) -> None:
    """Raise SourceError, naming a packed tensor and the method, for a checkpoint that is quantized already.

    beside: names of what is no tensor, as torch's own packed layers are.
    """
    packed = [name for name, tensor in stored.items() if is_packed(name, tensor, stored)]
    packed += [name for name in beside if PACKED.search(name)]
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
    if tensor.dtype in OF_A_BYTE and is_weight(name):
        return True
    scales = [
        name.removesuffix(end) + end_of_scale
        for end, others in BESIDE.items()
        if name.endswith(end)
        for end_of_scale in others
    ]
    return any(end_of_scale in stored for end_of_scale in scales)


def _method(config: Mapping[str, Any]) -> str:
    said = config.get("quantization_config")
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    return f" by {method} (config.json)" if isinstance(method, str) else ""
