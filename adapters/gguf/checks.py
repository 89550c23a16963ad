"""What a GGUF file holds of a plan: the type of every tensor, and what is refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mpq_plugins.checkpoints.checkpoint import read_checkpoint
from mpq_plugins.checkpoints.gguf_header import GGUFHeader, TensorEntry, is_gguf, read_gguf
from mpq_plugins.checkpoints.readers import StoredTensor
from mpq_plugins.common.checks import path_of
from mpq_plugins.errors import SettingError, SourceError
from mpq_plugins.plans.affine import Affine
from mpq_plugins.plans.arguments import check_plan
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.ggml import GGML, TYPES
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.legalise import require_legal
from mpq_plugins.plans.names import layer_name
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.match import match
from mpq_plugins.simulation.planned_tensors import PlannedTensors
from mpq_plugins.weights.gguf_names import kept_by_llama_cpp

from .names import renamed

CAPABILITIES = Capabilities(
    backend="gguf",
    bits=(1, 2, 3, 4, 5, 6, 7, 8),
    kinds=("linear", "embedding"),
    schemes=("affine", "ggml"),
    symmetric=(False, True, "full"),
    granularities=("per_tensor", "per_channel", "per_group"),
)
SYMMETRIC, ASYMMETRIC = {4: "q4_0", 5: "q5_0", 8: "q8_0"}, {4: "q4_1", 5: "q5_1"}
BLOCK = 32  # of each of these


@dataclass(frozen=True)
class Target:
    """What becomes of a tensor.

    kind: ggml's type, `f16`, or None where it is copied; choices: of its matrices, in order: one for a layer, and one
    for each expert of a stack.
    """

    entry: TensorEntry
    stored: StoredTensor
    kind: str | None = None
    choices: tuple[LayerChoice, ...] = ()

    @property
    def rounds(self) -> bool:
        """Whether ggml rounds it, and not the plan's scheme."""
        return bool(self.choices) and isinstance(self.choices[0].scheme, GGML)


@dataclass(frozen=True)
class Opened:
    """A GGUF file and the plan by its names."""

    header: GGUFHeader
    plan: Plan
    tensors: Mapping[str, StoredTensor]

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """What becomes of each tensor. Raises SettingError, naming a layer that the format cannot hold."""
        planned = PlannedTensors(self.plan.by_any_name)
        return tuple(self._target(entry, planned) for entry in self.header.tensors)

    def _target(self, entry: TensorEntry, planned: PlannedTensors) -> Target:
        stored = self.tensors[entry.name]
        choices: tuple[LayerChoice | None, ...] = (planned.layer(entry.name),)
        if choices == (None,) and planned.is_stack(entry.name, entry.shape):
            stack = layer_name(entry.name)
            choices = tuple(planned.choices.get(f"{stack}.{expert}") for expert in range(entry.shape[0]))
        named = tuple(choice for choice in choices if choice is not None)
        if not named:
            return Target(entry, stored)
        kinds = [None if choice is None else type_of(choice) for choice in choices]
        if len(set(kinds)) > 1:
            raise SettingError(
                f"layer {named[0].name!r}: the experts of {layer_name(entry.name)!r} are one tensor of one type, and "
                f"the plan has {', '.join(sorted({kind or 'float' for kind in kinds}))} for them; --tie experts"
            )
        kind = kinds[0]
        if kind == "f16" and entry.type_name in ("F16", "BF16"):
            kind = None  # which has 16 bits already
        if kind in TYPES and kept_by_llama_cpp(layer_name(entry.name)):
            raise SettingError(
                f"layer {named[0].name!r}: llama.cpp keeps tensors of this name in floating point; skip the layer "
                f"(--skip {named[0].name!r})"
            )
        return Target(entry, stored, kind, named) if kind is not None else Target(entry, stored)


def check(plan: Plan, source: Path) -> None:
    """Check that a GGUF file can hold the plan of this one.

    Args:
        plan: The plan, of this file or of the checkpoint of transformers that it was converted from.
        source: The model's GGUF file.

    Raises:
        SettingError: The format cannot hold the plan. The message names layers and the remedy.
        MismatchError: The plan is another model's.
        SourceError: The file cannot be read.
    """
    opened(plan, source)


def opened(plan: Plan, source: Path) -> Opened:
    """The file, of which the plan can be exported."""
    check_plan(plan)
    require_legal(plan, CAPABILITIES)
    for layer in plan.layers:
        type_of(layer)
    source = path_of("source", source)
    if not is_gguf(source):
        raise SourceError(
            f"{source}: is no GGUF file. Convert the checkpoint, in floating point (llama.cpp's convert_hf_to_gguf,"
            " --outtype f32); the plan may have the checkpoint's names. --config-only needs no GGUF file"
        )
    header, checkpoint = read_gguf(source), read_checkpoint(source)
    blocks = header.metadata.get(f"{header.architecture}.block_count")
    named = renamed(plan, header.architecture, blocks if isinstance(blocks, int) else 0)
    made = Opened(header, match(named, source, checkpoint=checkpoint).require(str(source)), checkpoint.tensors)
    _ = made.targets  # what cannot be is found now, and not after the work
    return made


def type_of(choice: LayerChoice) -> str | None:
    """ggml's type that holds a layer's codes, `f16`, or None for what is left alone. Raises SettingError."""
    if choice.in_float:
        return "f16" if choice.in_float16 else None
    if choice.parts is not None and len(choice.parts) > 1:
        raise SettingError(
            f"layer {choice.name!r}: its channels differ in width, and a tensor has one type; --no-parts"
        )
    if isinstance(choice.scheme, GGML):
        return choice.scheme.type
    assert isinstance(choice.scheme, Affine), "by the capabilities"
    return _plain_type(choice, choice.scheme)


def _plain_type(choice: LayerChoice, scheme: Affine) -> str:
    """The plain type that has the same codes: scales are of blocks of 32."""
    (bits, _), *_ = choice.widths
    kinds = SYMMETRIC if scheme.symmetric else ASYMMETRIC
    inputs = choice.shape[1 - choice.channel_axis]
    if bits not in kinds:
        raise SettingError(
            f"layer {choice.name!r}: {bits} bits, {scheme}, are codes that no type of GGUF files holds; symmetric ones "
            "of 4, 5 and 8 bits are held, and asymmetric ones of 4 and 5. Plan with these (--bits 4,5,8 --symmetric), "
            "or under ggml's own types (--scheme ggml)"
        )
    if inputs % BLOCK or (scheme.group_size or BLOCK) % BLOCK:
        raise SettingError(
            f"layer {choice.name!r}: {inputs} inputs, {scheme.grain}, are no blocks of {BLOCK} with a scale each; use "
            f"a group size that {BLOCK} divides, or skip the layer"
        )
    return kinds[bits]
