"""What each stage of Deep Compression leaves of a layer in bytes, read off a container's codes.

Stages are the paper's (arXiv 1510.00149, tables 2 to 4): pruned (P), its weights shared or quantized and packed (P+Q),
Huffman coded (P+Q+H); and what the file really takes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np
from torch import Tensor

from ..checkpoints.readers import DTYPES
from ..plans.granular import FLOAT_BITS
from ..plans.layers import LayerChoice
from ..quantization.contract import PartCodes, PartShape
from .bitpack import Codes, packed_bytes
from .codes import are_zero
from .container import Container, part_shape
from .huffman import coded_bytes, entropy_bits
from .sparse import index_bits, to_relative


@dataclass(frozen=True)
class Stages:
    """One layer, or several together; sizes in bytes.

    zeros: weights that are 0; entries: codes that are kept, fillers included, where zeros are left out; entropy_bits:
    of the codes, zeros included, at the least, and of weights in float as they are; original: as in the source; sparse:
    the weights that are not 0 and the gaps between them, or all weights where that is less; tables: scales, zero points
    and centroids; packed_codes, packed_gaps, huffman_codes, huffman_gaps: the codes of entries and the gaps between
    them (0 where all codes are kept), whichever arrangement is smaller; stored: the layer's block in the file.
    """

    weights: int
    zeros: int
    entries: int
    entropy_bits: float
    original: int
    sparse: int
    tables: int
    packed_codes: int
    packed_gaps: int
    huffman_codes: int
    huffman_gaps: int
    stored: int

    @property
    def packed(self) -> int:
        """Packed, with tables and gaps."""
        return self.tables + self.packed_codes + self.packed_gaps

    @property
    def huffman(self) -> int:
        """Huffman coded, with tables and gaps."""
        return self.tables + self.huffman_codes + self.huffman_gaps

    @property
    def sparsity(self) -> float:
        """Share of the weights that are 0."""
        return self.zeros / max(1, self.weights)

    @property
    def entropy_per_weight(self) -> float:
        """Bits."""
        return self.entropy_bits / max(1, self.weights)


def total(stages: Iterable[Stages]) -> Stages:
    """All of them together."""
    rows = list(stages)
    return Stages(**{field.name: sum(getattr(row, field.name) for row in rows) for field in fields(Stages)})


def layer_stages(container: Container, name: str) -> Stages:
    """The stages of a planned layer, by its tensor's name. Raises FormatError where its block is damaged."""
    record = container.records[name]
    choice = container.choice(record)
    assert choice is not None, "the caller asks for a planned layer"
    itemsize = DTYPES[record.dtype].itemsize
    parts = zip(choice.all_parts, container.parts(name), strict=True)
    stages = [_part(part_shape(choice, part), stored, choice, itemsize) for part, stored in parts]
    return replace(total(stages), stored=record.block_bytes)


def planned(container: Container) -> list[str]:
    """The tensors that are layers of the plan, in the file's order."""
    return [record.name for record in container.header.tensors if record.parts is not None]


def _part(shape: PartShape, stored: PartCodes | Tensor, choice: LayerChoice, itemsize: int) -> Stages:
    weights, gap_bits = shape.weights, index_bits(choice.kind)
    if isinstance(stored, Tensor):
        assert shape.bits in FLOAT_BITS
        zeros, original, kept = int((stored == 0).sum()), weights * itemsize, stored.nbytes
        return Stages(weights, zeros, weights, 8.0 * kept, original, original, 0, kept, 0, kept, 0, 0)
    symbols, width = stored.symbols, shape.width
    index = to_relative(symbols, gap_bits)
    kept = len(index.values)
    dense, sparser = (packed_bytes(weights, width), 0), (packed_bytes(kept, width), packed_bytes(kept, gap_bits))
    packed = _smaller(dense, sparser)
    coded = _smaller((_huffman(symbols, width), 0), (_huffman(index.values, width), _huffman(index.gaps, gap_bits)))
    zero = are_zero(stored, shape)
    in_float = len(to_relative((~zero).astype(np.uint8), gap_bits).gaps)
    tables = stored.tables.nbytes + packed_bytes(len(stored.zero_points), shape.bits)
    original = weights * itemsize
    sparse = min(original, in_float * itemsize + packed_bytes(in_float, gap_bits))
    zeros = int(zero.sum())
    entries = weights if packed is dense else kept
    return Stages(
        weights, zeros, entries, entropy_bits(np.bincount(symbols)), original, sparse, tables, *packed, *coded, 0
    )


def _huffman(codes: Codes, bits: int) -> int:
    return coded_bytes(np.bincount(codes, minlength=2**bits)) if len(codes) else 0


def _smaller(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return min(one, other, key=sum)
