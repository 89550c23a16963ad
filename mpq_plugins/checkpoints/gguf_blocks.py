"""Blocks of ggml's types to the values that they mean, by the package gguf."""

import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.extras import how_to_install
from ..errors import SettingError
from ..plans.ggml import NUMBERS, TYPES


def dequantize_rows(blocks: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    """Bytes of blocks (R, bytes) -> the float32 values that they mean. Raises SettingError where gguf is missing."""
    block = TYPES[kind]
    if not blocks.size:
        return np.zeros((blocks.shape[0], blocks.shape[1] // block.size * block.weights), np.float32)
    return by_gguf("dequantize", blocks, kind)


def by_gguf(function: str, data: NDArray[Any], kind: str) -> NDArray[Any]:
    """What the package makes of data, without what numpy warns of in its arithmetic. Raises SettingError."""
    if find_spec("gguf") is None:
        raise SettingError(f"type: ggml's {kind} needs gguf, which is not installed: {how_to_install('gguf')}")
    import gguf

    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: NDArray[Any] = getattr(gguf.quants, function)(data, gguf.GGMLQuantizationType(NUMBERS[kind]))
    return made
