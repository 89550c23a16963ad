"""A checkpoint in, the same checkpoint with the weights of a plan out, in the same format."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint, load_lazily, load_torch, read_checkpoint, storage_identity
from ..checkpoints.gguf_header import is_gguf
from ..checkpoints.readers import StoredTensor, read_header, safetensors_tensors
from ..checkpoints.shards import weight_files
from ..checkpoints.state_dicts import StateDict, chosen_state_dict
from ..checkpoints.torch_files import refuse_expanded
from ..common.documents import load_json
from ..common.files import atomic_directory, atomic_path, unchanged
from ..common.progress import Progress
from ..common.text import first_sentence
from ..errors import SettingError, SourceError
from ..models.wrappers import bare_names
from ..plans.layers import LayerChoice
from ..plans.plan import Plan
from .floats import stored_dtype
from .layer import simulate_layer
from .match import Match, match
from .planned_tensors import PlannedTensors


def rewrite(  # noqa: PLR0913  # each option is what one caller knows
    source: Path,
    plan: Plan,
    target: Path,
    progress: Progress | None = None,
    *,
    fitted: Mapping[str, Tensor] | None = None,
    model: nn.Module | None = None,
    weights: str | None = None,
    checkpoint: Checkpoint | None = None,
) -> Match:
    """Write `source` with the plan's weights to `target`: a file as a file, a sharded directory as a directory.

    Quantized weights keep their dtype. A float32 layer that the plan has at 16 bits is written as float16, and a layer
    with parts keeps its dtype, whatever their bits. Everything else in the checkpoint (biases, norms, skipped layers,
    other sets of weights, metadata, a directory's other files) is carried over. fitted: tensors that stand in for the
    source's, by name: biases and statistics, and weights that are rounded to the plan's grids already. model: the
    module whose checkpoint it is, which says what of it are layers where the plan does not; weights: the key of the set
    that is meant, where it is not the one the plan was made from; checkpoint: the source's own, where it has been read
    whole. Returns how the plan fits. Raises MismatchError for a plan made for another model, SettingError for a target
    of another format or weights that cannot be written as they are stored, WeightError for NaN, infinity and values
    beyond float16, SourceError where reading or writing fails; nothing is left half written.
    """
    if is_gguf(source):
        raise SettingError(
            f"{source}: is a GGUF file, which mpq apply does not write: mpq export PLAN {source} --to gguf -o OUT.gguf "
            "writes it with a plan's types"
        )
    with unchanged(source):
        checkpoint = checkpoint or read_checkpoint(source, weights, prefer=plan.weights, whole=True)
        fit = match(plan, source, weights=True, model=model, checkpoint=checkpoint)
    named = fit.require(str(source))
    require_unscaled(fit)
    _check_target(source, target)
    total = sum(layer.numel for layer in named.layers)
    quantizer = _Quantizer(named.by_any_name, total, fitted or {}, progress)
    if source.is_dir():
        _rewrite_directory(source, target, quantizer)
    elif source.suffix == ".safetensors":
        with atomic_path(target) as temporary, unchanged(source):
            _rewrite_safetensors(source, temporary, quantizer, bare_names(_shapes([source])))
            quantizer.finish()
    else:
        with atomic_path(target) as temporary, unchanged(source):
            assert checkpoint.chosen is not None, "a torch checkpoint that was not read whole"
            _rewrite_torch(source, temporary, quantizer, checkpoint.content, checkpoint.chosen)
            quantizer.finish()
    return fit


def require_unscaled(fit: Match) -> None:
    """Raise SettingError where planned weights are stored as codes of 8-bit floating point, which hold no others."""
    planned = fit.plan.by_any_name
    scaled = [weight for weight in fit.present if weight.scale and weight.name in planned]
    if scaled:
        raise SettingError(
            f"layer {scaled[0].name!r}, one of {len(scaled)} such, is stored in 8-bit floating point and scaled by "
            f"{scaled[0].scale!r}: that can be planned from, and cannot hold what the plan makes of it. Convert the "
            "checkpoint to bfloat16 first"
        )


class _Quantizer:
    """Quantizes the planned parameters among those it is shown, and reports progress in weights."""

    def __init__(
        self,
        choices: Mapping[str, LayerChoice],
        total: int,
        fitted: Mapping[str, Tensor],
        progress: Progress | None,
    ) -> None:
        self.planned, self.total, self.progress = PlannedTensors(choices), total, progress
        self.done: dict[str, int] = {}  # layer -> weights; a tied one is quantized under each name that stands apart
        self.fitted = fitted
        self.saved = 0  # bytes by which float16 is less

    def __call__(self, parameter: str, tensor: Tensor) -> Tensor:
        made = self._made(parameter, tensor)
        self.saved += tensor.nbytes - made.nbytes
        return made

    def _made(self, parameter: str, tensor: Tensor) -> Tensor:
        choice = self.planned.layer(parameter)
        if choice is not None:
            # Fitted weights in the precision that they were fitted in, for there they lie on the grids to the bit.
            weight = self._simulated(choice, self.fitted.get(parameter, tensor))
            return weight.to(stored_dtype(choice, tensor.dtype))
        if self.planned.is_stack(parameter, tensor.shape):
            return self._stack(parameter, tensor)
        return self.fitted[parameter].to(tensor) if parameter in self.fitted else tensor

    def _stack(self, parameter: str, tensor: Tensor) -> Tensor:
        """A stack of experts, which has one dtype: float16 where each of them has."""
        experts = list(self.planned.experts(parameter, tensor))
        matrices = [matrix if one is None else self._simulated(one, matrix) for _, one, matrix in experts]
        made = torch.stack(matrices).reshape(tensor.shape)
        dtypes = {tensor.dtype if one is None else stored_dtype(one, tensor.dtype) for _, one, _ in experts}
        return made.to(dtypes.pop()) if len(dtypes) == 1 else made

    def _simulated(self, choice: LayerChoice, tensor: Tensor) -> Tensor:
        if self.progress is not None:
            self.progress(choice.name, sum(self.done.values()), self.total)
        self.done[choice.name] = choice.numel
        return simulate_layer(tensor, choice)

    def changes(self, parameter: str, tensor: Tensor) -> bool:
        """Whether what it makes of the parameter is another tensor."""
        return self.planned.has(parameter, tensor.shape) or parameter in self.fitted

    def finish(self) -> None:
        """Called before what was written takes its place."""
        assert sum(self.done.values()) == self.total, "a planned layer was not quantized"
        if self.progress is not None:
            self.progress("", self.total, self.total)


def _check_target(source: Path, target: Path) -> None:
    if target.resolve() == source.resolve():
        raise SettingError(f"output: {target} is the source itself; name another path")
    if source.is_dir() and source.resolve() in target.resolve().parents:
        raise SettingError(f"output: {target} lies inside the source; name a directory beside it")
    if source.is_dir():
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise SettingError(f"output: {target} exists; the source is a directory, so name a new or empty one")
        return
    if target.is_dir():
        raise SettingError(f"output: {target} is a directory; the source is a file, so name a file")
    if (source.suffix == ".safetensors") != (target.suffix == ".safetensors"):
        raise SettingError(f"output: {target} should end in {source.suffix}, the format of the source")


def _rewrite_safetensors(source: Path, target: Path, quantizer: _Quantizer, names: Mapping[str, str]) -> None:
    """By plain reads, for a file that is cut short under a memory map would end the process.

    names: what the file calls its tensors -> what the model does.
    """
    stored = safetensors_tensors(source)
    try:
        tensors = {
            name: quantizer(names[name], _values(source, name, tensor)).contiguous() for name, tensor in stored.items()
        }
        save_file(tensors, target, read_header(source).get("__metadata__"))
    except SafetensorError as error:
        raise SourceError(f"{source}: cannot be written again ({first_sentence(error)}); convert it first") from error


def _values(source: Path, name: str, stored: StoredTensor) -> Tensor:
    """A tensor of a file; of a dtype that we do not read, as the library gives it."""
    if not stored.foreign:
        return stored.tensor()
    with safe_open(source, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _rewrite_torch(
    source: Path,
    target: Path,
    quantizer: _Quantizer,
    content: Any,
    chosen: StateDict,
    names: Mapping[str, str] | None = None,
) -> None:
    """content: all of the file, and of it `chosen`, the weights; names: what the model calls tensors, of a shard."""
    state, tensors = chosen.state, chosen.tensors
    names = names or bare_names({name: tensor.shape for name, tensor in tensors.items()})
    identities = {name: storage_identity(name, tensor) for name, tensor in tensors.items()}
    written: dict[object, Tensor] = {}
    for name, tensor in tensors.items():
        if identities[name] not in written and quantizer.changes(names[name], tensor):
            refuse_expanded(source, name, tensor)
            written[identities[name]] = quantizer(names[name], tensor)
    for name in tensors:  # other names of the same storage, planned or not, stay tied to it
        state[name] = written.get(identities[name], tensors[name])
    try:
        torch.save(content, target)
    except RuntimeError as error:  # torch's way to say that the disk is full
        raise OSError(str(error).splitlines()[0]) from error


def _rewrite_directory(source: Path, target: Path, quantizer: _Quantizer) -> None:
    files = weight_files(source)
    shards = list(files.shards)
    names = bare_names(_shapes([source / shard for shard in shards]))
    with atomic_directory(target) as temporary, unchanged(source):
        for shard in shards:
            (temporary / shard).parent.mkdir(parents=True, exist_ok=True)
            if shard.endswith(".safetensors"):
                _rewrite_safetensors(source / shard, temporary / shard, quantizer, names)
            else:
                content = load_torch(source / shard)
                chosen = chosen_state_dict(content, source / shard)
                _rewrite_torch(source / shard, temporary / shard, quantizer, content, chosen, names)
        quantizer.finish()
        _copy_others(source, temporary, {*shards})
        if quantizer.saved and files.index is not None:
            _tell_size(temporary / files.index.name, quantizer.saved)
        temporary.chmod(source.stat().st_mode & 0o777)


def _copy_others(source: Path, target: Path, written: set[str]) -> None:
    """Configuration, tokenizer, index: whatever else makes the directory a model."""
    for path in source.rglob("*"):
        relative = path.relative_to(source)
        if path.is_file() and str(relative) not in written:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


def _tell_size(index: Path, saved: int) -> None:
    """Put right the size that an index tells, where it tells one."""
    document = load_json(index)
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
        metadata["total_size"] -= saved
        index.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _shapes(files: Iterable[Path]) -> dict[str, Sequence[int]]:
    """Of all tensors in the files, by the names they have there."""
    shapes: dict[str, Sequence[int]] = {}
    for path in files:
        if path.suffix == ".safetensors":
            shapes |= {name: stored.shape for name, stored in safetensors_tensors(path).items()}
        else:
            tensors = chosen_state_dict(load_lazily(path), path).tensors
            shapes |= {name: tensor.shape for name, tensor in tensors.items()}
    return shapes
