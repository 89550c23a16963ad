"""Experts as mlx-lm keeps them: one tensor stacks those of a layer, and files hold one for each.

Some of its models stack packed experts as they are loaded, and some only floats, so they are stacked here.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mpq_plugins.checkpoints.readers import StoredTensor
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.names import NUMBERED, layer_name

from ..shared.exporting import Found
from ..shared.float_checkpoint import FloatCheckpoint
from ..shared.shard_writer import ShardWriter

MODELS = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""Whose experts lie where `stacked_name` says, as has been tried."""
CALLED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def stacked_name(name: str) -> tuple[str, int] | None:
    """Where an expert's tensor or layer goes: the stack's name, and its place there; None for any other."""
    found = NUMBERED.search(name)
    if found is None:
        return None
    layer, dot, rest = name[found.end() :].partition(".")
    return f"{name[: found.start()]}switch_mlp.{CALLED.get(layer, layer)}{dot}{rest}", int(found[1])


def stacks(source: FloatCheckpoint) -> bool:
    """Whether experts are stacked: where all of them stay in float, mlx-lm does it."""
    return any(NUMBERED.search(parameter) for parameter, _ in source.coded_weights)


def require_experts_alike(source: FloatCheckpoint) -> None:
    """Refuse experts of a stack that differ, and models whose experts lie we do not know where. Raises SettingError."""
    if not stacks(source):
        return
    kind = source.config.get("model_type")
    if kind not in MODELS:
        first = next(layer_name(p) for p, _ in source.coded_weights if NUMBERED.search(p))
        raise SettingError(
            f"layer {first!r}: where mlx-lm keeps experts is known of {', '.join(MODELS)}, and this is {kind!r}; skip "
            "them (--skip '*.experts.*')"
        )
    seen: dict[str, tuple[str, LayerChoice | None]] = {}
    for parameter in source.tensors:
        place = stacked_name(layer_name(parameter))
        if place is None:
            continue
        choice = source.coded(parameter)
        first, other = seen.setdefault(place[0], (layer_name(parameter), choice))
        if _form(choice) != _form(other):
            raise SettingError(
                f"layer {layer_name(parameter)!r}: differs from {first!r}, and MLX keeps both in one tensor; plan with "
                "--tie experts, and skip or pin all of them or none"
            )


def _form(choice: LayerChoice | None) -> object:
    return None if choice is None else (choice.bits, choice.scheme.granularity, choice.scheme.group_size)


def _counts(source: FloatCheckpoint) -> Counter[str]:
    """Stack -> how many experts it has."""
    places = [stacked_name(layer_name(parameter)) for parameter in source.tensors]
    return Counter(place[0] for place in places if place is not None)


class StackingWriter(ShardWriter):
    """Keeps the tensors of experts until all of a stack are there."""

    def __init__(self, source: FloatCheckpoint, directory: Path) -> None:
        super().__init__(directory, "mlx")
        self._counts = _counts(source)
        self._held: dict[str, dict[int, Tensor]] = {}

    def put(self, name: str, tensor: Tensor) -> int:
        """Take a tensor; returns the bytes that are now to be written."""
        place = stacked_name(name)
        if place is None:
            return super().put(name, tensor)
        stack, number = place
        held = self._held.setdefault(stack, {})
        held[number] = tensor
        if len(held) < self._counts[stack.rpartition(".")[0]]:
            return 0
        experts = [held[number] for number in sorted(self._held.pop(stack))]
        dtypes = {expert.dtype for expert in experts}  # 16 bits hold the scales of some experts exactly
        wide = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return super().put(stack, torch.stack([expert.to(wide) for expert in experts]))


class StackedFound(Found):
    """Finds the tensors of experts in their stacks."""

    def __init__(self, source: FloatCheckpoint, tensors: Mapping[str, StoredTensor]) -> None:
        super().__init__(tensors)
        self._counts = _counts(source)

    def stored(self, name: str) -> StoredTensor | None:
        """Where a tensor lies; None where there is none."""
        place = stacked_name(name)
        if place is None:
            return super().stored(name)
        stack, number = place
        whole = super().stored(stack)
        if whole is None or len(whole.shape) != 3 or whole.shape[0] != self._counts[stack.rpartition(".")[0]]:
            return None
        return replace(whole, shape=whole.shape[1:], read_rows=whole.read_rows.part(number, transposed=False))
