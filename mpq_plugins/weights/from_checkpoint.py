"""The quantizable weights of a bare file, where no class can be asked: by name and shape, or as somebody says who knew.

Layers are floating tensors of 2 to 5 dimensions whose name ends in `.weight`, but for norms, tables and buffers
(not_layers.py); 2-D is an embedding where the last part of its name says so and a linear layer otherwise; 3-D, 4-D and
5-D are convolutions, but for stacked experts (roles.py), whose name need not end so, and whose layers are called
NAME.0, NAME.1 ... A plan, or the model's class, knows better: which convolution is transposed, which is a norm's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..checkpoints.readers import StoredTensor, same_values
from ..checkpoints.scaled import EIGHT_BITS, scale_name, scaled_reader
from ..errors import SourceError
from ..plans.names import are_experts, is_weight, layer_name, weight_name
from .dtypes import WEIGHT_DTYPES
from .handles import Weight
from .not_layers import is_embedding, why_no_layer
from .roles import Config, hidden_size, inputs_first, keeps_inputs_first, tied_by_configuration

KIND_BY_DIMENSIONS = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}


@dataclass(frozen=True)
class KnownLayer:
    """What is known of a layer whose weight has this shape."""

    kind: str
    channel_axis: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Known:
    """What a plan or a module says of a checkpoint's tensors.

    layers: by name, tied ones too; none: parameters that are no layer's weight; tied: names of one weight, which a file
    may hold apart; all: whether what is not among the layers is none.
    """

    layers: Mapping[str, KnownLayer] = field(default_factory=dict)
    none: frozenset[str] = frozenset()
    tied: tuple[tuple[str, ...], ...] = ()
    all: bool = False

    def layer(self, name: str, shape: Sequence[int]) -> KnownLayer | None:
        """What is known of a layer, if its weight has this shape."""
        known = self.layers.get(name)
        return known if known is not None and known.shape == tuple(shape) else None


Found = tuple[list[Weight], list[tuple[str, str]]]
"""Weights, and (parameter, why) of what was left alone."""


def stored_weights(stored: Mapping[str, StoredTensor], config: Config, known: Known) -> Found:
    """The layers of a checkpoint, those of one storage together, and what was left alone. Raises SourceError."""
    stored = with_ties(stored, config, known)
    shapes = {parameter: tensor.shape for parameter, tensor in stored.items()}
    by_identity: dict[object, Weight] = {}
    left_alone: list[tuple[str, str]] = []
    for parameter, tensor in stored.items():
        reason = _why_left_alone(parameter, tensor, shapes, known)
        if reason is not None:
            if len(tensor.shape) >= 2:
                left_alone.append((parameter, reason))
            continue
        for position, weight in enumerate(_layers(parameter, stored, shapes, config, known)):
            identity = (tensor.identity, position)
            first = by_identity.get(identity)
            by_identity[identity] = weight if first is None else _tied(first, weight)
    _check_names(by_identity.values())
    used = {weight.scale for weight in by_identity.values()}  # with its codes
    return list(by_identity.values()), [(name, why) for name, why in left_alone if name not in used]


def with_ties(stored: Mapping[str, StoredTensor], config: Config, known: Known) -> dict[str, StoredTensor]:
    """The tensors, copies of one weight that the model ties having one identity: those with the same values."""
    shapes = {parameter: tensor.shape for parameter, tensor in stored.items()}
    groups = [[weight_name(name) for name in names] for names in known.tied]
    groups.append(list(tied_by_configuration(shapes, config)))
    tensors = dict(stored)
    for group in groups:
        there = [parameter for parameter in group if parameter in tensors]
        for position, parameter in enumerate(there):
            twin = next((other for other in there[:position] if same_values(tensors[other], tensors[parameter])), None)
            if twin is not None:
                tensors[parameter] = replace(tensors[parameter], identity=tensors[twin].identity)
    return tensors


def _tied(first: Weight, other: Weight) -> Weight:
    """Two names of one weight as one layer: what is looked up and multiplied by too is an embedding, as in modules."""
    if other.kind == "embedding" != first.kind:
        return replace(other, tied=first.names)
    return replace(first, tied=(*first.tied, other.name))


def dtype_refusal(dtype: torch.dtype) -> str:
    """Why weights of a dtype cannot be quantized, in words; empty for those that can."""
    allowed = "float32, float16 or bfloat16. Convert the weight"
    return "" if dtype in WEIGHT_DTYPES else f"dtype {dtype} is not allowed; {allowed}"


def _why_left_alone(
    parameter: str, tensor: StoredTensor, shapes: Mapping[str, Sequence[int]], known: Known
) -> str | None:
    shape, experts = tensor.shape, are_experts(parameter, tensor.shape)
    if len(shape) not in KIND_BY_DIMENSIONS:
        return f"{len(shape)} dimensions"
    if experts and not shape[0]:
        return "a stack of no experts"
    if tensor.foreign or not tensor.dtype.is_floating_point:
        return f"dtype {tensor.foreign or tensor.dtype}"
    name = layer_name(parameter)
    named = is_weight(parameter)
    if (named and known.layer(name, shape)) or (experts and known.layer(f"{name}.0", shape[1:])):
        return None
    if parameter in known.none or (known.all and (named or experts)):
        return "no layer of the model"
    return why_no_layer(parameter, shape, shapes)


def _layers(
    parameter: str,
    stored: Mapping[str, StoredTensor],
    shapes: Mapping[str, Sequence[int]],
    config: Config,
    known: Known,
) -> list[Weight]:
    """Of one tensor: one layer, or one for each expert."""
    tensor, name = stored[parameter], layer_name(parameter)
    whole = known.layer(name, tensor.shape)
    if whole is None and are_experts(parameter, tensor.shape):
        return _experts(parameter, tensor, shapes, config, known)
    kind, axis = (whole.kind, whole.channel_axis) if whole is not None else _by_name(name, tensor.shape, shapes, config)
    if tensor.dtype in EIGHT_BITS:
        return [_of_eight_bits(name, kind, axis, stored[parameter], stored, config)]
    reader, refusal = tensor.read_rows.along(axis), dtype_refusal(tensor.dtype)
    return [Weight(name, kind, tensor.shape, tensor.dtype, axis, reader, refusal=refusal)]


def _by_name(name: str, shape: Sequence[int], shapes: Mapping[str, Sequence[int]], config: Config) -> tuple[str, int]:
    """Kind and channel axis."""
    if is_embedding(name, shape, shapes):
        return "embedding", 0
    return KIND_BY_DIMENSIONS[len(shape)], int(keeps_inputs_first(name, shape, shapes, config))


def _experts(
    parameter: str, tensor: StoredTensor, shapes: Mapping[str, Sequence[int]], config: Config, known: Known
) -> list[Weight]:
    name = layer_name(parameter)
    said = known.layer(f"{name}.0", tensor.shape[1:])
    if said is not None:
        transposed = said.channel_axis == 1
    else:
        transposed = inputs_first(parameter, tensor.shape, hidden_size(shapes.items(), config()), config())
    return [
        Weight(
            f"{name}.{expert}",
            "linear",
            tensor.shape[1:],
            tensor.dtype,
            int(transposed),
            tensor.read_rows.part(expert, transposed),
            refusal=dtype_refusal(tensor.dtype),
        )
        for expert in range(tensor.shape[0])
    ]


def _of_eight_bits(
    name: str, kind: str, axis: int, tensor: StoredTensor, stored: Mapping[str, StoredTensor], config: Config
) -> Weight:
    """A weight of 8-bit floating point, as what it means: codes times scales."""
    scale = scale_name(name, stored)
    reader = scaled_reader(tensor, scale, stored[scale], config()) if scale is not None and axis == 0 else None
    if scale is not None and reader is not None:
        return Weight(name, kind, tensor.shape, torch.float32, axis, reader, scale=scale)
    if scale is None:
        why = f"{dtype_refusal(tensor.dtype)}: no tensor scales it, such as {name}.weight_scale"
    else:
        dtype = stored[scale].foreign or stored[scale].dtype
        sizes = f"{list(stored[scale].shape)} for {list(tensor.shape)}, {dtype}"
        why = f"{dtype_refusal(tensor.dtype)}: how {scale!r} scales it is not known ({sizes})"
    return Weight(name, kind, tensor.shape, tensor.dtype, 0, tensor.read_rows, refusal=why)


def _check_names(weights: Iterable[Weight]) -> None:
    """Raise SourceError where two tensors would be layers of one name."""
    seen: set[str] = set()
    for name in (name for weight in weights for name in weight.names):
        if name in seen:
            raise SourceError(f"layer {name!r}: two tensors of the checkpoint would be called so; rename one")
        seen.add(name)
