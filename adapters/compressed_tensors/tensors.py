"""Layers as compressed-tensors keeps them: packed codes or bytes, scales and zero points, and back."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mpq_plugins.checkpoints.readers import StoredTensor
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.names import layer_name, weight_name

from ..shared.exporting import Decoded, Found, ReadBack
from ..shared.layer_codes import CHUNK, Scales, code_chunks, exact_dtype
from . import nvfp4
from .nvfp4 import is_nvfp4

PACKED, BYTES = "pack-quantized", "naive-quantized"
"""Formats by their own names: b bits a code, or one byte whatever the width, which alone has zero points."""


def is_symmetric(choice: LayerChoice) -> bool:
    """Whether all zero points are 0, as binary codes' are whatever the scheme says; floating-point codes have none."""
    scheme = choice.scheme.as_affine
    return choice.bits == 1 or is_nvfp4(choice) or (scheme is not None and bool(scheme.symmetric))


def stored_bits(choice: LayerChoice) -> int:
    """Bits of a stored code: -1 and +1 do not fit into one, which holds -1 and 0."""
    assert choice.bits is not None, "one width a layer"
    return max(2, choice.bits)


def encode(parameter: str, choice: LayerChoice, stored: StoredTensor) -> dict[str, Tensor]:
    """The tensors of one layer. Scales are in the model's dtype where that holds them exactly, and else in float32."""
    if is_nvfp4(choice):
        return nvfp4.encode(parameter, choice, stored)
    from compressed_tensors.compressors.pack_quantized import pack_to_int32  # which takes long to import

    symmetric, bits, pieces = is_symmetric(choice), stored_bits(choice), list[Tensor]()
    chunks = []
    for chunk in code_chunks(stored.read_rows, choice):
        pieces.append(pack_to_int32(chunk.codes, bits) if symmetric else chunk.codes)
        chunks.append(Scales(chunk.scale, chunk.zero_point))
    scales = Scales.joined(chunks)
    name = layer_name(parameter)
    tensors = {
        weight_name(name) + ("_packed" if symmetric else ""): torch.cat(pieces),
        weight_name(name) + "_scale": scales.scale.to(exact_dtype(stored.dtype, scales.scale)),
    }
    if symmetric:
        tensors[weight_name(name) + "_shape"] = torch.tensor(choice.shape)
    else:
        tensors[weight_name(name) + "_zero_point"] = scales.zero_point.to(torch.int8)
    return tensors


def decode(parameter: str, choice: LayerChoice, found: Found) -> ReadBack:
    """One layer read back. Raises VerifyError."""
    if is_nvfp4(choice):
        return nvfp4.decode(parameter, choice, found)
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32  # which takes long to import

    rows, columns = choice.shape
    bits, name = stored_bits(choice), weight_name(layer_name(parameter))
    groups = max(1, choice.scheme.groups_per_channel(choice.shape, choice.channel_axis, choice.name))
    scale = found.take(f"{name}_scale", (rows, groups), torch.float32, torch.float16, torch.bfloat16)
    if not is_symmetric(choice):
        codes = found.take(name, choice.shape, torch.int8)
        zero_point = found.take(f"{name}_zero_point", (rows, groups), torch.int8).long()
        return Decoded(codes, Scales(scale.float(), zero_point), f"{bits} bits, a byte each, scales {scale.dtype}")
    found.take(f"{name}_shape", (2,), torch.int64)
    packed = found.take(f"{name}_packed", (rows, -(-columns * bits // 32)), torch.int32)
    codes = torch.cat([unpack_from_int32(part, bits, torch.Size((len(part), columns))) for part in _parts(packed)])
    zeros = torch.zeros((rows, groups), dtype=torch.int64)
    return Decoded(codes, Scales(scale.float(), zeros), f"{bits} bits packed in int32, scales {scale.dtype}")


def _parts(packed: Tensor) -> Iterator[Tensor]:
    """Some rows at a time: unpacking takes many times a part's size."""
    yield from packed.split(max(1, CHUNK // max(1, 4 * packed.shape[1])))
