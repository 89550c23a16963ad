"""Codes as little-endian streams of bits along rows of 32-bit words, as MLX and GPTQ keep them."""

import numpy as np
import torch
from torch import Tensor

from mpq_plugins.compression.bitpack import pack, unpack


def packed_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 .. 2^bits - 1 (rows, n) as int32 words (rows, n bits / 32), the last word of a row filled with zeros."""
    rows, count = codes.shape
    words = -(-count * bits // 32)
    padded = np.zeros((rows, -(-count // 32) * 32), np.uint8)  # 32 codes are whole words, whatever their width
    padded[:, :count] = codes.numpy()
    stream = np.frombuffer(pack(padded.reshape(-1), bits), "<i4").reshape(rows, -1)
    return torch.from_numpy(stream[:, :words].astype(np.int32))


def unpacked_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """Undo packed_rows: uint8 (rows, count)."""
    rows = words.shape[0]
    whole = -(-count // 32)
    padded = np.zeros((rows, whole * bits), "<i4")
    padded[:, : words.shape[1]] = words.numpy()
    codes = unpack(padded.tobytes(), bits, rows * whole * 32)
    return torch.from_numpy(codes.astype(np.uint8).reshape(rows, -1)[:, :count].copy())
