"""A plan as llama-quantize's --tensor-type-file: its types, that program's rounding."""

import re
from collections.abc import Iterator
from pathlib import Path

from mpq_plugins.checkpoints.gguf_header import GGUFHeader, is_gguf, read_gguf
from mpq_plugins.common.checks import path_of
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.affine import Affine
from mpq_plugins.plans.arguments import check_plan
from mpq_plugins.plans.ggml import GGML, NEEDS_IMPORTANCE, TYPES
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.names import layer_name, stacks_of, weight_name
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.match import match
from mpq_plugins.weights.gguf_names import architecture_of, kept_by_llama_cpp
from mpq_plugins.weights.roles import read_config

from .names import renamed

ROUNDED_BLIND = ("token_embd", "per_layer_token_embd", "output")
"""What llama-quantize rounds without an importance matrix to any type."""
NEAREST = {2: "q2_k", 3: "q3_k", 6: "q6_k"}
EXACT = {(True, 4): "q4_0", (True, 5): "q5_0", (True, 8): "q8_0", (False, 4): "q4_1", (False, 5): "q5_1",
         (False, 8): "q8_0"}  # fmt: skip


def config(plan: Plan, source: Path) -> str:
    """Make the file of types for the GGUF file that a plan is of, or for a checkpoint of transformers.

    Args:
        plan: The plan.
        source: The model's GGUF file, or the checkpoint's directory with its config.json.

    Returns:
        The text: a pattern and a type a line, for `llama-quantize --tensor-type-file`.

    Raises:
        SettingError: llama-quantize would not do what the plan says. The message names layers and the remedy.
        MismatchError: The plan is another model's.
        SourceError: The source cannot be read.
    """
    check_plan(plan)
    source = path_of("source", source)
    if not is_gguf(source):
        match(plan, source).require(str(source))
        return types_file(plan, *architecture_of(read_config(source)))
    header = read_gguf(source)
    blocks = header.metadata.get(f"{header.architecture}.block_count")
    named = renamed(plan, header.architecture, blocks if isinstance(blocks, int) else 0)
    fit = match(named, source).require(str(source))
    return _text(fit, False, header)


def types_file(plan: Plan, architecture: str | None = None, layers: int = 0, *, imatrix: bool = False) -> str:
    """Make the file of types from a plan alone.

    Every layer that the plan knows is named, skipped ones too, for what is not named gets the mixture of the whole
    file's type. Name a quantized type as the whole file's on the command line, and no --pure, --output-tensor-type or
    --token-embedding-type: llama-quantize then heeds the file.

    Args:
        plan: The plan.
        architecture: What GGUF calls the model's architecture, as `llama`; None where the plan has GGUF's names.
        layers: How many blocks the model has.
        imatrix: Whether llama-quantize will be given an importance matrix, which some types need.

    Returns:
        The text: a pattern and a type a line.

    Raises:
        SettingError: A layer has no name in GGUF files, or llama-quantize would ignore its type, change it, or refuse
            it.
    """
    check_plan(plan)
    return _text(renamed(plan, architecture, layers), imatrix, None)


def _text(plan: Plan, imatrix: bool, header: GGUFHeader | None) -> str:
    kinds = _by_tensor(plan, imatrix)
    stored = {} if header is None else {entry.name: entry.type_name.lower() for entry in header.tensors}
    for name in _left(plan, header):
        kinds.setdefault(name, stored.get(name, "f16") if stored.get(name, "f16") in _FLOATS else "f16")
    for name, kind in kinds.items():
        if kind is None:
            held = stored.get(name, "f32")
            kinds[name] = held if held in _FLOATS else "f16"
    return "".join(f"^{re.escape(name)}$={kind}\n" for name, kind in kinds.items())


_FLOATS = ("f32", "f16", "bf16")


def _left(plan: Plan, header: GGUFHeader | None) -> Iterator[str]:
    """Tensors that the plan leaves in float and llama-quantize would quantize."""
    if header is not None:
        names = [entry.name for entry in header.tensors if len(entry.shape) > 1 and entry.name.endswith("weight")]
    else:
        stacks = stacks_of(plan.skipped)
        names = [weight_name(stack) for stack in stacks if stack.endswith("_exps")]
        names += [weight_name(name) for name in plan.skipped if name.rpartition(".")[0] not in stacks]
    yield from (name for name in names if not kept_by_llama_cpp(layer_name(name)))


def _by_tensor(plan: Plan, imatrix: bool) -> dict[str, str | None]:
    """Tensor -> type; None for what stays as it is. Raises SettingError."""
    kinds: dict[str, str | None] = {}
    first: dict[str, LayerChoice] = {}
    for layer in plan.layers:
        kind = _type_of(layer)
        for name in layer.names:
            tensor = _tensor_of(name)
            if tensor in kinds and kinds[tensor] != kind:
                raise SettingError(
                    f"layer {layer.name!r}: is one tensor with {first[tensor].name!r}, of {kinds[tensor] or 'float'}, "
                    f"and the plan has {kind or 'float'} for it; experts have one type (--tie experts)"
                )
            kinds[tensor], first[tensor] = kind, layer
            _check_heeded(layer, tensor, kind, imatrix)
    for name in plan.skipped:
        tensor = _tensor_of(name)
        if kinds.get(tensor) not in (None, *_FLOATS):
            raise SettingError(
                f"layer {name!r}: is skipped, and one tensor with {first[tensor].name!r}, of {kinds[tensor]}; skip or "
                "plan all experts of a layer"
            )
    return kinds


def _tensor_of(name: str) -> str:
    """The tensor of a layer; experts NAME.0, NAME.1 ... are one."""
    stack, _, number = name.rpartition(".")
    return weight_name(stack if number.isdigit() and stack.endswith("_exps") else name)


def _type_of(layer: LayerChoice) -> str | None:
    if layer.in_float:
        return "f16" if layer.in_float16 else None
    if layer.parts is not None and len(layer.parts) > 1:
        raise SettingError(f"layer {layer.name!r}: its channels differ in width, and a tensor has one type; --no-parts")
    scheme = layer.scheme
    if isinstance(scheme, GGML):
        return scheme.type
    (bits, _), *_ = layer.widths
    if not isinstance(scheme, Affine) or layer.coded_bytes is not None:
        raise SettingError(
            f"layer {layer.name!r}: {scheme} is no type of ggml's, and none comes near it; plan with ggml's own "
            "(--types gguf, or --scheme ggml)"
        )
    if scheme.stochastic is not None:
        raise SettingError(
            f"layer {layer.name!r}: {scheme}, and llama-quantize rounds to nearest; plan without stochastic, or export "
            "the GGUF file itself, which has the plan's codes"
        )
    kind = EXACT.get((bool(scheme.symmetric), bits)) or NEAREST.get(bits)
    if kind is None:
        raise SettingError(f"layer {layer.name!r}: ggml has no type of {bits} bits; 2, 3, 4, 5, 6 or 8")
    return kind


def _check_heeded(layer: LayerChoice, tensor: str, kind: str | None, imatrix: bool) -> None:
    """Raise SettingError where llama-quantize would ignore a type, replace it or stop."""
    name = layer_name(tensor)
    if tensor != tensor.lower():
        raise SettingError(
            f"layer {layer.name!r}: llama-quantize lower-cases patterns, so none matches {tensor!r}; skip it"
        )
    if kind not in TYPES:
        return
    if kept_by_llama_cpp(name):
        raise SettingError(
            f"layer {layer.name!r}: llama-quantize keeps tensors of this name in floating point, whatever it is asked; "
            f"skip the layer (--skip {layer.name!r})"
        )
    typed = GGML(type=kind)  # type: ignore[arg-type]  # one of them
    if not typed.fits(layer.shape, layer.channel_axis):
        other = typed.fallback(layer.shape, layer.channel_axis)
        raise SettingError(
            f"layer {layer.name!r}: rows of {list(layer.shape)} are no whole blocks of {kind}, for which llama-quantize"
            f" takes {'f16' if other is None else other.type}; plan that"
        )
    if kind in NEEDS_IMPORTANCE and not imatrix and name not in ROUNDED_BLIND:
        raise SettingError(
            f"layer {layer.name!r}: llama-quantize refuses {kind} without --imatrix; make one, and the file by "
            "types_file(plan, ..., imatrix=True)"
        )
