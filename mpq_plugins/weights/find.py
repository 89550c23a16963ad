"""Named quantizable weights of a model, a checkpoint or its shards: handles first, values one chunk at a time.

From a module: the weights of Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d and Embedding, subclasses included, and of
transformers' Conv1D. From a checkpoint, where no class can be asked: see from_checkpoint.py. Whatever is left alone is
listed with its reason.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint, read_checkpoint
from ..checkpoints.joined import with_stacks
from ..errors import SettingError, SourceError, WeightError
from ..models.arguments import check_source
from ..models.folding import conv_bn_pairs
from ..models.tracing import Traced
from ..models.wrappers import renaming
from ..plans.names import are_experts, is_weight, layer_name, weight_name
from .averages import refuse_averages
from .from_checkpoint import Known, KnownLayer, stored_weights
from .from_module import module_weights
from .handles import Weight, Weights
from .packed import refuse_packed
from .roles import BY_DEFAULT, PREFIX, Config, left_by_default, read_config
from .select import select, why_none


@dataclass(frozen=True)
class _Asked:
    """Which of a source's weights are wanted; see find_weights. where: the source, in words."""

    skip: Sequence[str]
    only: Sequence[str]
    refuse: bool
    where: str


def find_weights(  # noqa: PLR0913  # each option is a user's word
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

    Args:
        source: The module, or the path.
        skip: Globs on the names of layers to leave out, tied ones included, `re:` and a regular expression, or a role
            in a language model: `role:embeddings`, `role:lm_head` (the input embedding where that is tied),
            `role:routers`, `role:lora` (low-rank adapters), `role:fragile` (small tables and gates). Of a checkpoint
            the last two are skipped unless `only` matches them.
        only: The same for the layers to take; by default all.
        fold_bn: Whether to give conv weights with their BatchNorm folded in (modules only).
        refuse: Whether to raise for a weight that cannot be quantized, rather than list it with its `refusal`.
        weights: The key of the weights that are meant in a torch checkpoint with several sets, such as
            `state_dict_ema`.
        model: The module whose checkpoint the source is. It says which tensors are layers, and which of them are
            transposed.
        already_quantized: Whether to list what is left in floating point of a checkpoint whose other weights are
            packed, rather than refuse it.

    Returns:
        Handles on the weights, in the source's order, with what was left out.

    Raises:
        SourceError: The source cannot be read, is packed, has averages beside what they are of, or holds nothing
            quantizable.
        WeightError: A weight has a dtype that we do not quantize.
        SettingError: A glob matches nothing, or an option means nothing with such a source.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> [(weight.name, weight.shape) for weight in mpq.find_weights(net)]
        [('0', (8, 8)), ('2', (2, 8))]
    """
    check_source(source)
    if isinstance(source, nn.Module):
        if weights is not None or model is not None:
            raise SettingError("weights, model: they say what a checkpoint holds, and the source is a module itself")
        return weights_of_module(Traced(source), skip, only, fold_bn, refuse)
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


def weights_of_module(
    traced: Traced,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    fold_bn: bool = False,
    refuse: bool = True,
) -> Weights:
    """The weights of a module, which is traced where BatchNorm is folded in. See find_weights."""
    pairs = conv_bn_pairs(traced) if fold_bn else {}
    weights, left_alone = module_weights(traced.model, pairs)
    asked = _Asked(skip, only, refuse, type(traced.model).__name__)
    return _chosen_weights(weights, left_alone, asked, pairs=pairs)


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
    weights, left_alone = stored_weights(with_stacks(checkpoint.tensors), config, known)
    by_default = {name: role for name, role in left_by_default(weights).items() if name not in known.layers}
    asked = _Asked(skip, only, refuse, str(path))
    made = _chosen_weights(weights, left_alone, asked, config=config, by_default=by_default)
    return replace(made, key=checkpoint.key)


def known_by(model: nn.Module, checkpoint: Checkpoint) -> Known:
    """What a module says of its checkpoint's tensors, by the names that they have there.

    Raises SourceError, naming a layer, where the checkpoint is not the module's.
    """
    weights, _ = module_weights(model, {})
    names = renaming([weight.names for weight in weights], (), could_be_layers(checkpoint))
    where = f"model: {type(model).__name__}"
    for weight in weights:
        there = [names.get(name, name) for name in weight.names]
        held = next((checkpoint.tensors[key] for key in map(weight_name, there) if key in checkpoint.tensors), None)
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
            for weight in weights
            for name in weight.names
        },
        tied=tuple(tuple(names.get(name, name) for name in weight.names) for weight in weights if weight.tied),
        all=True,
    )


def could_be_layers(checkpoint: Checkpoint) -> list[str]:
    """Names of layers that the tensors of a checkpoint could be, those of stacks of experts as well."""
    names: list[str] = []
    for parameter, tensor in with_stacks(checkpoint.tensors).items():
        name = layer_name(parameter)
        if len(tensor.shape) >= 2 and is_weight(parameter):
            names.append(name)
        if are_experts(parameter, tensor.shape):
            names += [f"{name}.{expert}" for expert in range(tensor.shape[0])]
    return list(dict.fromkeys(names))


def _chosen_weights(
    weights: list[Weight],
    left_alone: list[tuple[str, str]],
    asked: _Asked,
    *,
    config: Config = dict,
    by_default: Mapping[str, str] | None = None,
    pairs: Mapping[str, str] | None = None,
) -> Weights:
    _check_names((name for weight in weights for name in weight.names), asked.where)
    kept = select(weights, asked.skip, asked.only, asked.where, config)
    by_default = {} if asked.only else by_default or {}
    left_alone = left_alone + [
        (weight_name(weight.name), f"{PREFIX}{by_default[weight.name]}, {BY_DEFAULT[by_default[weight.name]]}")
        for weight in kept
        if weight.name in by_default
    ]
    kept = [weight for weight in kept if weight.name not in by_default]
    if not kept and asked.refuse:
        raise SourceError(f"{asked.where}: no quantizable weights. {why_none(weights, left_alone)}")
    for weight in kept:
        if weight.refusal and asked.refuse:
            raise WeightError(f"layer {weight.name!r}: {weight.refusal}, or skip the layer.")
    names = {weight.name for weight in kept}
    skipped = tuple(weight.name for weight in weights if weight.name not in names)
    return Weights(tuple(kept), skipped, tuple(left_alone), _folding(pairs or {}, weights, names))


def _check_names(names: Iterable[str], where: str) -> None:
    """Raise SourceError for a name that no file could hold."""
    for name in names:
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise SourceError(f"{where}: layer {name!r} holds half a surrogate pair, which is no character; rename it")


def _folding(pairs: Mapping[str, str], weights: Sequence[Weight], kept: Collection[str]) -> dict[str, str]:
    """What is folded of these pairs where some layers are kept; nothing where no layer that is kept has a pair."""
    if not any(name in pairs for name in kept):
        return {}
    skipped = {name for weight in weights if weight.name not in kept for name in weight.names}
    return {convolution: norm for convolution, norm in pairs.items() if convolution not in skipped}


def iter_weights(source: nn.Module | str | Path, **options: bool | Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield each layer's name and weight, one at a time.

    Args:
        source: The module, or the path.
        **options: As for `find_weights`.

    Yields:
        (layer name, weight), the weight in its own shape.

    Raises:
        SourceError: As `find_weights`.
        WeightError: As `find_weights`.
        SettingError: As `find_weights`.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> for name, weight in mpq.iter_weights(torch.nn.Sequential(torch.nn.Linear(8, 2))):
        ...     print(name, list(weight.shape))
        0 [2, 8]
    """
    for weight in find_weights(source, **options):  # type: ignore[arg-type]  # checked there
        yield weight.name, weight.tensor()
