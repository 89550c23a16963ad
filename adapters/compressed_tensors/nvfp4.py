"""Layers of the type nvfp4 as compressed-tensors keeps them: two codes a byte, FP8 scales, one over the layer's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mpq_plugins.checkpoints.readers import StoredTensor
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.quantization.contract import PartShape
from mpq_plugins.quantization.quantize import quantizer

from ..shared.exporting import Found

FORMAT = "nvfp4-pack-quantized"
FP8 = torch.float8_e4m3fn


def is_nvfp4(choice: LayerChoice) -> bool:
    """Whether the layer is of that type."""
    return choice.type == "nvfp4"


@dataclass(frozen=True)
class Blocks:
    """A layer. packed: codes, uint8 (channels, inputs / 2), the first in the low half; scale: FP8 (channels, blocks);
    divisor: float32 (1,), one over the layer's scale."""

    packed: Tensor
    scale: Tensor
    divisor: Tensor
    stored: str = "nvfp4, two codes a byte, scales torch.float8_e4m3fn"

    @classmethod
    def of(cls, choice: LayerChoice, stored: StoredTensor) -> "Blocks":
        """What the plan makes of a weight. Raises WeightError for NaN or infinity."""
        channels, inputs = choice.shape
        part = PartShape(choice.shape, choice.channel_axis, 4, choice.scheme, choice.name)
        made = quantizer(choice.scheme).encode(stored.tensor(), part)
        codes, tables = torch.from_numpy(made.symbols).reshape(channels, inputs), torch.from_numpy(made.tables)
        packed = codes[:, ::2] | codes[:, 1::2] << 4
        return cls(packed, tables[:-1].reshape(channels, -1).to(FP8), 1 / tables[-1:])

    def problem(self, choice: LayerChoice, stored: StoredTensor) -> str | None:
        """How it differs from what the plan makes of a weight, in words; None where it does not."""
        expected = Blocks.of(choice, stored)
        differing = self.packed ^ expected.packed
        wrong = int((differing & 15 != 0).sum() + (differing >> 4 != 0).sum())
        if wrong:
            return f"has {wrong} of {choice.numel} codes that are not the plan's"
        if not self.scale.view(torch.uint8).equal(expected.scale.view(torch.uint8)):
            return "has other scales than the plan's"
        return None if self.divisor.equal(expected.divisor) else "has another scale of the layer than the plan's"


def encode(parameter: str, choice: LayerChoice, stored: StoredTensor) -> dict[str, Tensor]:
    """The tensors of one layer."""
    made = Blocks.of(choice, stored)
    return {
        f"{parameter}_packed": made.packed, f"{parameter}_scale": made.scale, f"{parameter}_global_scale": made.divisor,
    }  # fmt: skip


def decode(parameter: str, choice: LayerChoice, found: Found) -> Blocks:
    """One layer read back. Raises VerifyError."""
    channels, inputs = choice.shape
    blocks = choice.scheme.groups_per_channel(choice.shape, choice.channel_axis, choice.name)
    return Blocks(
        found.take(f"{parameter}_packed", (channels, inputs // 2), torch.uint8),
        found.take(f"{parameter}_scale", (channels, blocks), FP8),
        found.take(f"{parameter}_global_scale", (1,), torch.float32),
    )
