"""Named quantizable weights of a model, a checkpoint or its shards: handles first, values one chunk at a time.

From a module: the weights of Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d and Embedding, subclasses included.
From a bare file, where no class can be asked: floating tensors of 2 to 5 dimensions whose name ends in
`.weight` (so no bias, norm or statistic); 2-D is an embedding where the last part of its name says so and a
linear layer otherwise; 3-D, 4-D and 5-D are convolutions, but for stacked experts (roles.py), whose name need not end
so, and whose layers are called NAME.0, NAME.1 ... Whatever is left alone is listed with its reason.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .buffers import chunk_buffer
from .checkpoints import layer_name, open_checkpoint
from .errors import SettingError, SourceError, WeightError
from .fold import conv_bn_pairs, folded_weight
from .patterns import matches
from .quantize.regions import from_channel_rows
from .quantize.weight import WEIGHT_DTYPES
from .roles import PREFIX, Config, are_experts, hidden_size, in_role, inputs_first, read_config
from .tensor_files import Allocate, MemoryRows, RowReader, StoredTensor

KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Embedding: "embedding",
}
KIND_BY_DIMENSIONS = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}
EMBEDDING_NAMES = ("*embed*", "wte", "wpe", "shared")


@dataclass(frozen=True)
class Weight:
    """A handle on one layer's weight. Reading happens in `rows` and `tensor`, not before.

    name: the layer's, without `.weight`; channel_axis: the output axis (1 for ConvTranspose, else 0);
    tied: other names of the same storage.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    channel_axis: int
    read_rows: RowReader
    tied: tuple[str, ...] = ()
    refusal: str = ""  # why it cannot be quantized, for a layer that must be skipped

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, then its tied ones."""
        return (self.name, *self.tied)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.shape[self.channel_axis]

    def rows(self, start: int, stop: int, allocate: Allocate = chunk_buffer) -> Tensor:
        """Output channels start..stop as a matrix (stop - start, numel / channels), in the stored dtype.

        They may lie in what `allocate(bytes)` gives. Raises SourceError where they cannot be read.
        """
        return self.read_rows(start, stop, allocate)

    def cut(self, start: int, stop: int) -> "Weight":
        """Output channels start..stop as a weight of their own."""
        axis = self.channel_axis
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return replace(self, shape=shape, read_rows=self.read_rows.cut(start, stop), tied=())

    def tensor(self) -> Tensor:
        """The whole weight in its own shape."""
        return from_channel_rows(self.rows(0, self.channels), self.shape, self.channel_axis)


@dataclass(frozen=True)
class Weights:
    """What a source holds: iterate for the quantizable weights, in the source's order.

    skipped: quantizable layers left out on request; left_alone: (parameter name, why) of tensors with two or
    more dimensions that are no quantizable layer.
    """

    weights: tuple[Weight, ...]
    skipped: tuple[str, ...]
    left_alone: tuple[tuple[str, str], ...]
    folded: bool

    def __iter__(self) -> Iterator[Weight]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def find_weights(
    source: nn.Module | str | Path,
    *,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    fold_bn: bool = False,
    refuse: bool = True,
) -> Weights:
    """List the quantizable weights of a module, a `.safetensors` file, a sharded directory or a torch checkpoint.

    skip, only: globs on layer names, tied ones included, `re:` and a regular expression, or a role in a language model:
    `role:embeddings`, `role:lm_head` (the input embedding where that is tied), `role:routers`. fold_bn: give conv
    weights with their BatchNorm folded in (modules only). refuse: raise for a weight that cannot be quantized, rather
    than list it with its `refusal`.
    Raises SourceError (unreadable, or nothing quantizable), WeightError (a dtype we do not quantize),
    SettingError (a glob that matches nothing, or folding asked of a bare file).
    """
    if isinstance(source, nn.Module):
        pairs = conv_bn_pairs(source) if fold_bn else {}
        found, left_alone = _module_weights(source, pairs)
        config: Config = dict
        where = type(source).__name__
    else:
        if fold_bn:
            raise SettingError(
                f"fold_bn: {source} is a checkpoint, and a checkpoint does not say which BatchNorm follows which "
                "layer. Pass the module itself, or fold_bn=False."
            )
        config = cache(partial(read_config, Path(source)))
        found, left_alone = _stored_weights(open_checkpoint(Path(source)), config)
        pairs = {}
        where = str(source)
    kept = _select(found, skip, only, where, config)
    if not kept:
        raise SourceError(f"{where}: no quantizable weights. {_why_none(found, left_alone)}")
    for weight in kept:
        if weight.refusal and refuse:
            raise WeightError(f"layer {weight.name!r}: {weight.refusal}, or skip the layer.")
    names = {weight.name for weight in kept}
    skipped = tuple(weight.name for weight in found if weight.name not in names)
    return Weights(tuple(kept), skipped, tuple(left_alone), folded=any(weight.name in pairs for weight in kept))


def iter_weights(source: nn.Module | str | Path, **options: bool | Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (layer name, weight) one at a time; options as for find_weights."""
    for weight in find_weights(source, **options):  # type: ignore[arg-type]  # checked there
        yield weight.name, weight.tensor()


def layer_kind(module: nn.Module) -> str | None:
    """The kind of a quantizable module, or None."""
    return next((kind for cls, kind in KINDS.items() if isinstance(module, cls)), None)


def channel_axis_of(kind: str) -> int:
    """The output axis of a weight: 1 for transposed convolutions (in, out/groups, ...), else 0."""
    return 1 if kind.startswith("conv_transpose") else 0


def quantizable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model's quantizable layers by layer name, tied ones under their first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if layer_kind(module) is None:
            continue
        weight = module.weight
        assert isinstance(weight, Tensor)
        if id(weight) not in seen:
            seen.add(id(weight))
            found[name] = weight
    return found


def _module_weights(model: nn.Module, pairs: Mapping[str, str]) -> tuple[list[Weight], list[tuple[str, str]]]:
    found: dict[int, Weight] = {}
    left_alone: list[tuple[str, str]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        kind = layer_kind(module)
        left_alone += _other_parameters(name, module, kind)
        if kind is None:
            continue
        weight = module.weight
        assert isinstance(weight, Tensor)
        refusal = _refusal(weight)
        identity = id(module) if refusal else id(weight)  # a computed weight is another tensor each time
        known = found.get(identity)
        if known is not None:
            found[identity] = replace(known, tied=(*known.tied, name))
            continue
        if name in pairs and not refusal:
            weight = folded_weight(module, model.get_submodule(pairs[name]))
        found[identity] = _from_tensor(name, kind, weight if refusal else weight.detach(), refusal)
    return list(found.values()), list(dict.fromkeys(left_alone))


def _refusal(weight: Tensor) -> str:
    if not isinstance(weight, nn.Parameter) or isinstance(weight, nn.UninitializedParameter) or weight.is_meta:
        return (
            "its weight is parametrized, lazy or on the meta device, so there is no stored value to quantize. Remove "
            "the parametrization (mpq_plugins.finish does after prune and share) or materialise the weight first"
        )
    return _dtype_refusal(weight.dtype)


def _dtype_refusal(dtype: torch.dtype) -> str:
    allowed = "float32, float16 or bfloat16. Convert the weight"
    return "" if dtype in WEIGHT_DTYPES else f"dtype {dtype} is not allowed; {allowed}"


def _other_parameters(name: str, module: nn.Module, kind: str | None) -> Iterable[tuple[str, str]]:
    for own, parameter in module.named_parameters(recurse=False):
        if isinstance(parameter, nn.UninitializedParameter) or parameter.dim() < 2 or (kind and own == "weight"):
            continue
        reason = f"{type(module).__name__} is no layer kind we quantize" if kind is None else "not the layer's weight"
        yield f"{name}.{own}" if name else own, reason


def _stored_weights(stored: Mapping[str, StoredTensor], config: Config) -> tuple[list[Weight], list[tuple[str, str]]]:
    found: dict[object, Weight] = {}
    left_alone: list[tuple[str, str]] = []
    shapes = {parameter: tensor.shape for parameter, tensor in stored.items()}
    for parameter, tensor in stored.items():
        experts = are_experts(parameter, tensor.shape)
        reason = _why_left_alone(parameter, tensor, experts)
        if reason is not None:
            if len(tensor.shape) >= 2:
                left_alone.append((parameter, reason))
            continue
        made = _experts(parameter, tensor, shapes, config()) if experts else [_stored_weight(parameter, tensor)]
        for position, weight in enumerate(made):
            identity = (tensor.identity, position)
            known = found.get(identity)
            found[identity] = weight if known is None else replace(known, tied=(*known.tied, weight.name))
    _check_names(found.values())
    return list(found.values()), left_alone


def _check_names(weights: Iterable[Weight]) -> None:
    """Raise SourceError where two tensors would be layers of one name."""
    seen: set[str] = set()
    for name in (name for weight in weights for name in weight.names):
        if name in seen:
            raise SourceError(f"layer {name!r}: two tensors of the checkpoint would be called so; rename one")
        seen.add(name)


def _stored_weight(parameter: str, tensor: StoredTensor) -> Weight:
    name = layer_name(parameter)
    kind, refusal = _kind_by_name(name, len(tensor.shape)), _dtype_refusal(tensor.dtype)
    return Weight(name, kind, tensor.shape, tensor.dtype, 0, tensor.read_rows, refusal=refusal)


def _experts(
    parameter: str, tensor: StoredTensor, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]
) -> list[Weight]:
    transposed = inputs_first(parameter, tensor.shape, hidden_size(shapes.items(), config), config)
    return [
        Weight(
            f"{layer_name(parameter)}.{expert}",
            "linear",
            tensor.shape[1:],
            tensor.dtype,
            int(transposed),
            tensor.read_rows.part(expert, transposed),
            refusal=_dtype_refusal(tensor.dtype),
        )
        for expert in range(tensor.shape[0])
    ]


def _why_left_alone(parameter: str, tensor: StoredTensor, experts: bool) -> str | None:
    if len(tensor.shape) not in KIND_BY_DIMENSIONS:
        return f"{len(tensor.shape)} dimensions"
    if experts and not tensor.shape[0]:
        return "a stack of no experts"
    if not tensor.dtype.is_floating_point:
        return f"dtype {tensor.dtype}"
    if not experts and parameter != "weight" and not parameter.endswith(".weight"):
        return "its name does not end in .weight"
    return None


def _kind_by_name(name: str, dimensions: int) -> str:
    last = name.rpartition(".")[2]
    if dimensions == 2 and any(fnmatchcase(last, pattern) for pattern in EMBEDDING_NAMES):
        return "embedding"
    return KIND_BY_DIMENSIONS[dimensions]


def _from_tensor(name: str, kind: str, weight: Tensor, refusal: str) -> Weight:
    axis = channel_axis_of(kind)
    return Weight(name, kind, _shape(weight), weight.dtype, axis, MemoryRows(weight, axis), refusal=refusal)


def _shape(weight: Tensor) -> tuple[int, ...]:
    return () if isinstance(weight, nn.UninitializedParameter) else tuple(weight.shape)


def _select(
    found: Sequence[Weight], skip: Sequence[str], only: Sequence[str], where: str, config: Config
) -> list[Weight]:
    names = [name for weight in found for name in weight.names]
    chosen: dict[str, set[str]] = {"skip": set(), "only": set()}
    for option, patterns in (("skip", skip), ("only", only)):
        for pattern in patterns:
            own = _chosen(pattern, found, config)
            chosen[option] |= own
            if not own:
                raise SettingError(
                    f"{option}: {pattern!r} matches none of the {len(found)} layers of {where}; "
                    f"names look like {', '.join(map(repr, names[:3])) or 'nothing, there are none'}"
                )
    return [w for w in found if (not only or w.name in chosen["only"]) and w.name not in chosen["skip"]]


def _chosen(pattern: str, found: Sequence[Weight], config: Config) -> set[str]:
    """By any of its names: a tied weight cannot be skipped under one and quantized under another."""
    if pattern.startswith(PREFIX):
        return in_role(pattern.removeprefix(PREFIX), found, config)
    return {weight.name for weight in found if any(matches(pattern, name) for name in weight.names)}


def _why_none(found: Sequence[Weight], left_alone: Sequence[tuple[str, str]]) -> str:
    if found:
        return f"All {len(found)} layers are skipped; relax skip or only."
    if left_alone:
        name, reason = left_alone[0]
        return f"{len(left_alone)} tensors were left alone, the first being {name!r}: {reason}."
    return "It holds no tensor of two or more dimensions."
