"""The float checkpoint that an exporter reads: a directory as transformers keeps it, and the plan by its names."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpq_plugins.checkpoints.checkpoint import read_checkpoint
from mpq_plugins.checkpoints.readers import StoredTensor
from mpq_plugins.common.checks import path_of
from mpq_plugins.common.documents import LARGEST_DOCUMENT
from mpq_plugins.common.files import CONFIG_NAME, read_regular
from mpq_plugins.errors import SettingError, SourceError
from mpq_plugins.plans.arguments import check_plan
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.names import JOINED, are_experts, is_weight, layer_name, weight_name
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.checkpoint import require_unscaled
from mpq_plugins.simulation.floats import stored_dtype
from mpq_plugins.simulation.layer import simulate_layer
from mpq_plugins.simulation.match import match
from mpq_plugins.simulation.planned_tensors import PlannedTensors
from mpq_plugins.weights.not_layers import is_embedding
from mpq_plugins.weights.roles import is_head, read_config, tied_by_configuration


@dataclass(frozen=True)
class FloatCheckpoint:
    """plan: with the names that its layers have here; tensors: where they lie; config: all of config.json."""

    path: Path
    plan: Plan
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]

    @cached_property
    def planned(self) -> PlannedTensors:
        """The choices by the names of tensors."""
        return PlannedTensors(self.plan.by_any_name)

    def coded(self, parameter: str) -> LayerChoice | None:
        """The choice of the layer whose weight this is, if it becomes codes."""
        choice = self.planned.layer(parameter)
        return None if choice is None or choice.in_float else choice

    @property
    def coded_weights(self) -> Iterator[tuple[str, LayerChoice]]:
        """Tensors that become codes, with their choices; of a head that the model ties the input embedding alone."""
        for parameter in self.tensors:
            choice = self.coded(parameter)
            if choice is not None and not self.is_copy(parameter):
                yield parameter, choice

    @property
    def stacks(self) -> list[str]:
        """Tensors of several experts of which one or more become codes."""
        stacks = [p for p, tensor in self.tensors.items() if self.planned.is_stack(p, tensor.shape)]
        coded = {layer_name(layer.name.rpartition(".")[0]) for layer in self.plan.layers if not layer.in_float}
        return [parameter for parameter in stacks if layer_name(parameter) in coded]

    @cached_property
    def _tied(self) -> frozenset[str]:
        """Tensors of one shape that the configuration ties: input embedding and head."""
        shapes = {parameter: tensor.shape for parameter, tensor in self.tensors.items()}
        return frozenset(tied_by_configuration(shapes, lambda: read_config(self.path)))

    def is_copy(self, parameter: str) -> bool:
        """Whether it is a head stored beside the embedding that the model ties it to, and that is planned with it."""
        choice, name = self.planned.layer(parameter), layer_name(parameter)
        if choice is None or parameter not in self._tied or not is_head(name):
            return False
        return any(weight_name(other) in self._tied for other in choice.names if other != name)

    def in_float(self, parameter: str) -> Tensor:
        """A tensor that no codes stand for: the source's own, or at 16 bits in float16. Raises SourceError."""
        tensor = self.tensors[parameter].tensor()
        choice = self.planned.layer(parameter)
        if choice is not None:
            return simulate_layer(tensor, choice).to(stored_dtype(choice, tensor.dtype))
        if not self.planned.is_stack(parameter, tensor.shape):
            return tensor
        experts = list(self.planned.experts(parameter, tensor))
        made = torch.stack([matrix if one is None else simulate_layer(matrix, one) for _, one, matrix in experts])
        dtypes = {tensor.dtype if one is None else stored_dtype(one, tensor.dtype) for _, one, _ in experts}
        made = made.reshape(tensor.shape)  # some checkpoints join experts in one matrix
        return made.to(dtypes.pop()) if len(dtypes) == 1 else made


def open_float(plan: Plan, source: Path) -> FloatCheckpoint:
    """The checkpoint that the plan is of.

    Raises SourceError for what is no directory with a config.json, or quantized already; MismatchError for another
    model's plan; SettingError for what is no plan, and weights stored in 8-bit floating point.
    """
    check_plan(plan)
    source = path_of("source", source)
    if not source.is_dir():
        raise SourceError(
            f"{source}: is no directory. An export needs the model's {CONFIG_NAME} and tokenizer too: give the "
            "directory that holds them and the weights"
        )
    config = _config(source)
    checkpoint = read_checkpoint(source, prefer=plan.weights)
    fit = match(plan, source, checkpoint=checkpoint)
    named = fit.require(str(source))
    require_unscaled(fit)
    return FloatCheckpoint(source, named, checkpoint.tensors, config)


def _config(source: Path) -> dict[str, Any]:
    file = source / CONFIG_NAME
    try:
        config = json.loads(read_regular(file, LARGEST_DOCUMENT))  # others' configurations may hold Infinity
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise SourceError(f"{file}: cannot be read ({reason}); an export needs the model's configuration") from error
    if not isinstance(config, dict):
        raise SourceError(f"{file}: is no JSON object; an export needs the model's configuration")
    quantized = next((key for key in ("quantization_config", "quantization") if config.get(key)), None)
    if quantized is not None:
        raise SourceError(f"{file}: has {quantized!r}, so the checkpoint is quantized already; give the float one")
    return config


def require_plain(source: FloatCheckpoint, target: str) -> None:
    """Refuse layers whose weight is not one matrix of outputs by inputs, or has no weights. Raises SettingError."""
    for _, choice in source.coded_weights:
        if 0 in choice.shape:
            raise SettingError(
                f"layer {choice.name!r}: has no weights ({list(choice.shape)}), which {target} cannot hold as codes; "
                f"skip it (--skip {choice.name!r})"
            )
    for parameter in source.stacks:
        raise SettingError(
            f"layer {layer_name(parameter)!r}: one tensor stacks its experts, and {target} has a tensor for each; skip "
            f"it (--skip '{layer_name(parameter)}*'), or take a checkpoint that keeps experts apart"
        )
    for parameter, choice in source.coded_weights:
        if choice.channel_axis != 0:
            raise SettingError(
                f"layer {choice.name!r}: keeps inputs first, as GPT-2's Conv1D does, and {target} holds outputs first; "
                f"skip it (--skip {choice.name}), or convert the checkpoint"
            )
        assert len(source.tensors[parameter].shape) == 2, "a matrix, by its kind"


def left_in_float(source: FloatCheckpoint, *, embeddings: bool = False) -> Iterator[str]:
    """Matrices that stay in float, by their modules' names: loaders may take what they are not told of for quantized.

    The head is one also where the file has none, for it is the input embedding then, unless that is quantized and
    `embeddings` are asked for.
    """
    shapes = {parameter: stored.shape for parameter, stored in source.tensors.items()}
    names = [p for p in source.tensors if len(shapes[p]) == 2 and is_weight(p) and source.coded(p) is None]
    for name in map(layer_name, names):
        choice = source.plan.by_any_name.get(name)
        embeds = is_embedding(name, shapes[weight_name(name)], shapes) if choice is None else choice.kind == "embedding"
        if embeddings or is_head(name) or not embeds:
            yield name
    if embeddings:
        return
    if not any(is_head(layer_name(parameter)) for parameter in source.tensors):
        yield "lm_head"
    yield from dict.fromkeys(_stacked_experts(source))


def _stacked_experts(source: FloatCheckpoint) -> Iterator[str]:
    """Tensors of several experts, which are in float, and the modules that engines make of them."""
    for parameter, stored in source.tensors.items():
        name = layer_name(parameter)
        if are_experts(parameter, stored.shape) or JOINED.search(name):
            yield name
            holder, experts, _ = name.rpartition("experts")
            yield holder + experts if experts else name.rpartition(".")[0]
