"""Named quantizable weights of a model, a checkpoint or its shards: handles first, values one chunk at a time.

From a module: the weights of Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d and Embedding, subclasses included. From a
checkpoint, where no class can be asked: see stored_weights.py. Whatever is left alone is listed with its reason.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .averages import refuse_averages
from .checkpoints import Checkpoint, read_checkpoint
from .common.patterns import matches
from .errors import SettingError, SourceError, WeightError
from .fold import conv_bn_pairs, folded_weight
from .handles import Weight as Weight
from .handles import Weights as Weights
from .packed import refuse_packed
from .plans.names import are_experts, is_weight, layer_name, weight_name
from .roles import BY_DEFAULT, PREFIX, Config, in_role, left_by_default, read_config
from .stored_weights import Found, Known, KnownLayer, dtype_refusal, stored_weights
from .tensor_files import MemoryRows
from .wrappers import renaming

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


def find_weights(
    source: nn.Module | str | Path,
    *,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    fold_bn: bool = False,
    refuse: bool = True,
    weights: str | None = None,
    model: nn.Module | None = None,
    already_quantized: bool = False,
) -> Weights:
    """List the quantizable weights of a module, a `.safetensors` file, a directory of them or a torch checkpoint.

    skip, only: globs on layer names, tied ones included, `re:` and a regular expression, or a role in a language model:
    `role:embeddings`, `role:lm_head` (the input embedding where that is tied), `role:routers`, `role:lora` (low-rank
    adapters), `role:fragile` (small tables and gates). Of a checkpoint the last two are skipped unless `only` matches
    them. fold_bn: give conv weights with their BatchNorm folded in (modules only). refuse: raise for a weight that
    cannot be quantized, rather than list it with its `refusal`. weights: the key of the weights that are meant in a
    torch checkpoint with several sets, such as `state_dict_ema`. model: the module whose checkpoint the source is; it
    says which tensors are layers, and which of them are transposed. already_quantized: list what is left in floating
    point of a checkpoint whose other weights are packed, rather than refuse it.
    Raises SourceError (unreadable, packed, with averages beside what they are of, or nothing quantizable), WeightError
    (a dtype we do not quantize), SettingError (a glob that matches nothing, or an option that means nothing with such
    a source).
    """
    if isinstance(source, nn.Module):
        if weights is not None or model is not None:
            raise SettingError("weights, model: they say what a checkpoint holds, and the source is a module itself")
        pairs = conv_bn_pairs(source) if fold_bn else {}
        found, left_alone = _module_weights(source, pairs)
        return _chosen_weights(found, left_alone, skip, only, refuse, type(source).__name__, pairs=pairs)
    if fold_bn:
        raise SettingError(
            f"fold_bn: {source} is a checkpoint, and a checkpoint does not say which BatchNorm follows which "
            "layer. Pass the module itself, or fold_bn=False."
        )
    checkpoint = read_checkpoint(Path(source), weights)
    known = known_by(model, checkpoint) if model is not None else Known()
    stored = checkpoint_weights(
        checkpoint, Path(source), known, skip=skip, only=only, refuse=refuse, already_quantized=already_quantized
    )
    if refuse and not only:
        refuse_averages({name: weight.shape for weight in stored for name in weight.names}, str(source))
    return stored


def checkpoint_weights(
    checkpoint: Checkpoint,
    path: Path,
    known: Known,
    *,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    refuse: bool = True,
    already_quantized: bool = False,
) -> Weights:
    """The weights of a checkpoint that is open, with what is known of it. See find_weights."""
    config = cache(partial(read_config, path))
    if not already_quantized:
        refuse_packed(checkpoint.tensors, checkpoint.beside, config, str(path))
    found, left_alone = stored_weights(checkpoint.tensors, config, known)
    by_default = {name: role for name, role in left_by_default(found).items() if name not in known.layers}
    made = _chosen_weights(found, left_alone, skip, only, refuse, str(path), config=config, by_default=by_default)
    return replace(made, key=checkpoint.key)


def known_by(model: nn.Module, checkpoint: Checkpoint) -> Known:
    """What a module says of its checkpoint's tensors, by the names that they have there.

    Raises SourceError, naming a layer, where the checkpoint is not the module's.
    """
    found, _ = _module_weights(model, {})
    names = renaming([weight.names for weight in found], (), could_be_layers(checkpoint))
    where = f"model: {type(model).__name__}"
    for weight in found:
        there = [names.get(name, name) for name in weight.names]
        held = next((checkpoint.tensors[own] for own in map(weight_name, there) if own in checkpoint.tensors), None)
        if held is None and not weight.refusal:
            raise SourceError(f"{where} has a layer {weight.name!r}, which the checkpoint lacks; name its own model")
        if held is not None and held.shape != weight.shape:
            raise SourceError(
                f"{where} has {list(weight.shape)} for layer {weight.name!r}, and the checkpoint {list(held.shape)}; "
                "name its own model"
            )
    return Known(
        {
            names.get(name, name): KnownLayer(weight.kind, weight.channel_axis, weight.shape)
            for weight in found
            for name in weight.names
        },
        tied=tuple(tuple(names.get(name, name) for name in weight.names) for weight in found if weight.tied),
        all=True,
    )


def could_be_layers(checkpoint: Checkpoint) -> list[str]:
    """Names of layers that the tensors of a checkpoint could be, those of stacks of experts as well."""
    found: list[str] = []
    for parameter, tensor in checkpoint.tensors.items():
        name = layer_name(parameter)
        if len(tensor.shape) >= 2 and is_weight(parameter):
            found.append(name)
        if are_experts(parameter, tensor.shape):
            found += [f"{name}.{expert}" for expert in range(tensor.shape[0])]
    return list(dict.fromkeys(found))


def _chosen_weights(
    found: list[Weight],
    left_alone: list[tuple[str, str]],
    skip: Sequence[str],
    only: Sequence[str],
    refuse: bool,
    where: str,
    *,
    config: Config = dict,
    by_default: Mapping[str, str] | None = None,
    pairs: Mapping[str, str] | None = None,
) -> Weights:
    kept = _select(found, skip, only, where, config)
    by_default = {} if only else by_default or {}
    left_alone = left_alone + [
        (weight_name(weight.name), f"{PREFIX}{by_default[weight.name]}, {BY_DEFAULT[by_default[weight.name]]}")
        for weight in kept
        if weight.name in by_default
    ]
    kept = [weight for weight in kept if weight.name not in by_default]
    if not kept and refuse:
        raise SourceError(f"{where}: no quantizable weights. {_why_none(found, left_alone)}")
    for weight in kept:
        if weight.refusal and refuse:
            raise WeightError(f"layer {weight.name!r}: {weight.refusal}, or skip the layer.")
    names = {weight.name for weight in kept}
    skipped = tuple(weight.name for weight in found if weight.name not in names)
    folded = any(weight.name in (pairs or {}) for weight in kept)
    return Weights(tuple(kept), skipped, tuple(left_alone), folded)


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
        weight = None if layer_kind(module) is None else getattr(module, "weight", None)
        if isinstance(weight, Tensor) and id(weight) not in seen:
            seen.add(id(weight))
            found[name] = weight
    return found


def _module_weights(model: nn.Module, pairs: Mapping[str, str]) -> Found:
    found: dict[int, Weight] = {}
    left_alone: list[tuple[str, str]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        kind = layer_kind(module)
        left_alone += _other_parameters(name, module, kind)
        if kind is None:
            continue
        weight = getattr(module, "weight", None)
        # What is computed is another tensor whenever it is asked for, and ties nothing.
        identity = id(weight) if isinstance(weight, nn.Parameter) else id(module)
        known = found.get(identity)
        if known is not None:
            found[identity] = replace(known, tied=(*known.tied, name))
            continue
        refusal = _refusal(weight)
        if refusal or not isinstance(weight, Tensor):
            found[identity] = _refused(name, kind, weight, refusal)
            continue
        if name in pairs:
            weight = folded_weight(module, model.get_submodule(pairs[name]))
        found[identity] = _from_tensor(name, kind, weight.detach())
    return list(found.values()), list(dict.fromkeys(left_alone))


def _refusal(weight: object) -> str:
    if not isinstance(weight, nn.Parameter) or isinstance(weight, nn.UninitializedParameter) or weight.is_meta:
        return (
            "its weight is parametrized, lazy or on the meta device, so there is no stored value to quantize. Remove "
            "the parametrization (mpq_plugins.finish does after prune and share) or materialise the weight first"
        )
    stored = type(weight.data)
    if stored.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"is quantized already, or kept in another form ({stored.__name__}): measure the float model"
    if weight.layout is not torch.strided:
        return f"its weight is kept as {weight.layout}, and only dense weights are quantized: call to_dense() on it"
    return dtype_refusal(weight.dtype)


def _other_parameters(name: str, module: nn.Module, kind: str | None) -> Iterable[tuple[str, str]]:
    for own, buffer in module.named_buffers(recurse=False):
        if buffer.dim() >= 2 and own not in module._non_persistent_buffers_set:
            yield f"{name}.{own}" if name else own, "a buffer"
    for own, parameter in module.named_parameters(recurse=False):
        if isinstance(parameter, nn.UninitializedParameter) or parameter.dim() < 2 or (kind and own == "weight"):
            continue
        reason = f"{type(module).__name__} is no layer kind we quantize" if kind is None else "not the layer's weight"
        yield f"{name}.{own}" if name else own, reason


def _from_tensor(name: str, kind: str, weight: Tensor) -> Weight:
    axis = channel_axis_of(kind)
    return Weight(name, kind, tuple(weight.shape), weight.dtype, axis, MemoryRows(weight, axis))


def _refused(name: str, kind: str, weight: object, refusal: str) -> Weight:
    """A layer that is only named: nothing of its weight is read but its shape, where it has one."""
    axis = channel_axis_of(kind)
    nothing = Weight(name, kind, (), torch.float32, axis, MemoryRows(torch.empty(0), axis), refusal=refusal)
    if not isinstance(weight, Tensor) or isinstance(weight, nn.UninitializedParameter):
        return nothing
    return replace(nothing, shape=tuple(weight.shape), dtype=weight.dtype)


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
    if found and not any(reason.startswith(PREFIX) for _, reason in left_alone):
        return f"All {len(found)} layers are skipped; relax skip or only."
    if left_alone:
        name, reason = left_alone[0]
        return f"{len(left_alone)} tensors were left alone, the first being {name!r}: {reason}."
    return "It holds no tensor of two or more dimensions."
