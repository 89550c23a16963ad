"""Layers as MLX keeps them, w = scale q + bias with q from 0, and back."""

import torch
from torch import Tensor

from mpq_plugins.checkpoints.readers import StoredTensor
from mpq_plugins.errors import VerifyError
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.names import layer_name, weight_name

from ..shared.exporting import Decoded, Found
from ..shared.layer_codes import Scales, code_chunks, exact_dtype
from ..shared.packing import packed_rows, unpacked_rows

SIZES = (32, 64, 128)


def group_size(choice: LayerChoice) -> int | None:
    """Inputs of a group: the plan's, or for whole channels the largest that fit; None where none do."""
    inputs = choice.shape[1]
    if choice.scheme.group_size is not None:
        return choice.scheme.group_size
    return next((size for size in reversed(SIZES) if inputs % size == 0), None)


def encode(parameter: str, choice: LayerChoice, stored: StoredTensor) -> dict[str, Tensor]:
    """The tensors of one layer. Scales and biases are in the model's dtype where that is exact, and else in float32."""
    bits, half = _bits(choice)
    pieces, chunks = list[Tensor](), list[Scales]()
    for chunk in code_chunks(stored.read_rows, choice):
        pieces.append(packed_rows((chunk.codes.to(torch.int16) + half).to(torch.uint8), bits))
        chunks.append(Scales(chunk.scale, chunk.zero_point))
    scales = Scales.joined(chunks).repeated(_groups(choice))
    biases = _biases(scales, half)
    dtype = exact_dtype(stored.dtype, scales.scale, biases)
    name = layer_name(parameter)
    return {
        weight_name(name): torch.cat(pieces).view(torch.uint32),
        _beside(name, "scales"): scales.scale.to(dtype),
        _beside(name, "biases"): biases.to(dtype),
    }


def decode(parameter: str, choice: LayerChoice, found: Found) -> Decoded:
    """One layer read back. Raises VerifyError."""
    (bits, half), (rows, columns), name = _bits(choice), choice.shape, layer_name(parameter)
    words = found.take(weight_name(name), (rows, columns * bits // 32), torch.uint32)
    dtypes = torch.float32, torch.float16, torch.bfloat16
    scale = found.take(_beside(name, "scales"), (rows, _groups(choice)), *dtypes)
    biases = found.take(_beside(name, "biases"), scale.shape, scale.dtype).float()
    zero_point = torch.round(-biases / scale.float()).nan_to_num().long() - half
    scales = Scales(scale.float(), zero_point)
    if not _biases(scales, half).equal(biases):
        raise VerifyError(f"{choice.name!r} has biases that are no multiples of its scales")
    parts = [unpacked_rows(part, bits, columns) for part in words.view(torch.int32).split(_ROWS)]
    codes = (torch.cat(parts).to(torch.int16) - half).to(torch.int8)
    return Decoded(codes, scales, f"{bits} bits packed in uint32, scales and biases {scale.dtype}")


_ROWS = 1024  # unpacked at a time


def _biases(scales: Scales, half: int) -> Tensor:
    return -(scales.zero_point + half).float() * scales.scale


def _bits(choice: LayerChoice) -> tuple[int, int]:
    """The width, and what is added to signed codes for those that begin at 0."""
    assert choice.bits is not None, "one width a layer"
    return choice.bits, 1 << (choice.bits - 1)


def _groups(choice: LayerChoice) -> int:
    return choice.shape[1] // (group_size(choice) or choice.shape[1])


def _beside(name: str, what: str) -> str:
    return f"{name}.{what}" if name else what
