"""Layers as GPTQ keeps them: codes down columns, zero points along rows, float16 scales, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mpq_plugins.checkpoints.readers import StoredTensor
from mpq_plugins.errors import SettingError, VerifyError
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.names import layer_name

from ..shared.exporting import Decoded, Found
from ..shared.layer_codes import Scales, code_chunks
from ..shared.packing import packed_rows, unpacked_rows

MOST_OFF = 2**-10  # of the layer's largest weight; float16 has steps of 2^-10


@dataclass(frozen=True)
class Layer:
    """tensors: by name; off: by how much of its largest weight float16 scales change a weight at most."""

    tensors: dict[str, Tensor]
    off: float


def is_symmetric(choice: LayerChoice) -> bool:
    """Whether all zero points are in the middle of the codes."""
    scheme = choice.scheme.as_affine
    return scheme is not None and bool(scheme.symmetric)


def encode(parameter: str, choice: LayerChoice, stored: StoredTensor, version: int) -> Layer:
    """The tensors of one layer; version: of the format, the first of which stores zero points less one.

    Raises SettingError where float16 does not hold a scale.
    """
    bits, half = _bits(choice)
    pieces, chunks, largest, off = list[Tensor](), list[Scales](), 0.0, 0.0
    for chunk in code_chunks(stored.read_rows, choice):
        pieces.append(packed_rows((chunk.codes.to(torch.int16) + half).to(torch.uint8), bits))
        chunks.append(Scales(chunk.scale, chunk.zero_point))
        steps = (chunk.group_rows(chunk.codes).long() - chunk.zero_point.reshape(-1, 1)).abs().amax(1).float()
        scale = chunk.scale.reshape(-1)
        largest = max(largest, float((steps * scale.abs()).max()))
        off = max(off, float((steps * (scale.half().float() - scale).abs()).nan_to_num(torch.inf, torch.inf).max()))
    share = off / largest if largest else 0.0
    if share > MOST_OFF:
        raise SettingError(
            f"layer {choice.name!r}: float16 does not hold its scales, weights would be off by {share:.2g} of the "
            f"largest; pin it to float (--pin {choice.name}=32), or skip it"
        )
    scales, name = Scales.joined(chunks), layer_name(parameter)
    zeros = (scales.zero_point + half - int(version == 1)).T
    return Layer(
        {
            _of(name, "qweight"): torch.cat(pieces).T.contiguous(),
            _of(name, "qzeros"): packed_rows(zeros.to(torch.uint8).contiguous(), bits),
            _of(name, "scales"): scales.scale.half().T.contiguous(),
            _of(name, "g_idx"): _group_of_input(choice),
        },
        share,
    )


def decode(parameter: str, choice: LayerChoice, found: Found, version: int) -> Decoded:
    """One layer read back. Raises VerifyError."""
    (bits, half), (rows, columns), name = _bits(choice), choice.shape, layer_name(parameter)
    groups = max(1, choice.scheme.groups_per_channel(choice.shape, choice.channel_axis, choice.name))
    words = found.take(_of(name, "qweight"), (columns * bits // 32, rows), torch.int32)
    zeros = found.take(_of(name, "qzeros"), (groups, rows * bits // 32), torch.int32)
    scale = found.take(_of(name, "scales"), (groups, rows), torch.float16)
    if not found.take(_of(name, "g_idx"), (columns,), torch.int32).equal(_group_of_input(choice)):
        raise VerifyError(f"{choice.name!r} has inputs in other groups than the plan's")
    zero_point = unpacked_rows(zeros, bits, rows).T.long() + int(version == 1) - half
    parts = [unpacked_rows(part.contiguous(), bits, columns) for part in words.T.split(_ROWS)]
    codes = (torch.cat(parts).to(torch.int16) - half).to(torch.int8)
    return Decoded(codes, Scales(scale.T, zero_point), f"{bits} bits packed in int32, scales torch.float16")


_ROWS = 1024  # unpacked at a time


def _bits(choice: LayerChoice) -> tuple[int, int]:
    """The width, and what is added to signed codes for those that begin at 0."""
    assert choice.bits is not None, "one width a layer"
    return choice.bits, 1 << (choice.bits - 1)


def _group_of_input(choice: LayerChoice) -> Tensor:
    inputs = choice.shape[1]
    return torch.arange(inputs, dtype=torch.int32) // (choice.scheme.group_size or max(1, inputs))


def _of(name: str, what: str) -> str:
    return f"{name}.{what}" if name else what
