"""A checkpoint in, the same checkpoint with fake-quantized weights out, in the same format."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoints import common_prefix, find_state_dict, layer_name, load_torch, storage_identity
from .errors import SettingError, SourceError
from .files import atomic_path, unchanged
from .match import match
from .plan import LayerChoice, Plan
from .roles import are_experts, stacks_of
from .shards import INDEX_NAME, SINGLE_NAME, shard_files
from .simulate import simulate
from .tensor_files import read_header, safetensors_tensors
from .torch_files import refuse_expanded

Progress = Callable[[str, int, int], None]


def rewrite(
    source: Path,
    plan: Plan,
    target: Path,
    progress: Progress | None = None,
    *,
    corrected: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `source` with the plan's weights to `target`: a file as a file, a sharded directory as a directory.

    Everything else in the checkpoint (biases, norms, skipped layers, metadata, a directory's other files) is
    carried over, but for what `corrected` replaces by name (see correct.py). Raises MismatchError for a plan made for
    another model, SettingError for a target of another
    format, SourceError where reading or writing fails; nothing is left half written.
    """
    match(plan, source).require(str(source))
    _check_target(source, target)
    total = sum(layer.numel for layer in plan.layers)
    quantizer = _Quantizer(plan.by_any_name, total, corrected or {}, progress)
    if source.is_dir():
        _rewrite_directory(source, target, quantizer)
    else:
        write = _rewrite_file if source.suffix == ".safetensors" else _rewrite_torch
        with atomic_path(target) as temporary, unchanged(source):
            write(source, temporary, quantizer)
    quantizer.finish()


class _Quantizer:
    """Quantizes the planned parameters among those it is shown, and reports progress in weights."""

    def __init__(
        self,
        choices: Mapping[str, LayerChoice],
        total: int,
        corrected: Mapping[str, Tensor],
        progress: Progress | None,
    ) -> None:
        self.choices, self.total, self.progress = choices, total, progress
        self.done: dict[str, int] = {}  # layer -> weights; a tied one is quantized under each name that stands apart
        self.corrected = corrected
        self.stacks = stacks_of(choices)

    def __call__(self, parameter: str, tensor: Tensor) -> Tensor:
        if not self.plans(parameter, tensor):
            return self.corrected[parameter].to(tensor) if parameter in self.corrected else tensor
        if not self._plans_whole(parameter):
            return self._experts(layer_name(parameter), tensor)
        return self._simulated(self.choices[layer_name(parameter)], tensor)

    def _experts(self, stack: str, tensor: Tensor) -> Tensor:
        """Each matrix of stacked experts as its own choice leaves it; one without a choice as it is."""
        choices = [self.choices.get(f"{stack}.{expert}") for expert in range(len(tensor))]
        pairs = zip(choices, tensor, strict=True)
        return torch.stack([matrix if choice is None else self._simulated(choice, matrix) for choice, matrix in pairs])

    def _simulated(self, choice: LayerChoice, tensor: Tensor) -> Tensor:
        if self.progress is not None:
            self.progress(choice.name, sum(self.done.values()), self.total)
        self.done[choice.name] = choice.numel
        return simulate(tensor, choice)

    def plans(self, parameter: str, tensor: Tensor) -> bool:
        stacked = layer_name(parameter) in self.stacks and are_experts(parameter, tensor.shape)
        return stacked or self._plans_whole(parameter)

    def _plans_whole(self, parameter: str) -> bool:
        return (parameter == "weight" or parameter.endswith(".weight")) and layer_name(parameter) in self.choices

    def changes(self, parameter: str, tensor: Tensor) -> bool:
        """Whether what it makes of the parameter is another tensor."""
        return self.plans(parameter, tensor) or parameter in self.corrected

    def finish(self) -> None:
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


def _rewrite_safetensors(source: Path, target: Path, quantizer: _Quantizer, prefix: str) -> None:
    """By plain reads: a file that is cut short under a memory map would end the process."""
    tensors = {
        name: quantizer(name.removeprefix(prefix), stored.tensor()).contiguous()
        for name, stored in safetensors_tensors(source).items()
    }
    save_file(tensors, target, read_header(source).get("__metadata__"))


def _rewrite_file(source: Path, target: Path, quantizer: _Quantizer) -> None:
    _rewrite_safetensors(source, target, quantizer, _prefix([source]))


def _rewrite_torch(source: Path, target: Path, quantizer: _Quantizer) -> None:
    content = load_torch(source)
    state = find_state_dict(content, source)
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    prefix = common_prefix(tensors)
    identities = {name: storage_identity(name, tensor) for name, tensor in tensors.items()}
    written: dict[object, Tensor] = {}
    for name, tensor in tensors.items():
        if identities[name] not in written and quantizer.changes(name.removeprefix(prefix), tensor):
            refuse_expanded(source, name, tensor)
            written[identities[name]] = quantizer(name.removeprefix(prefix), tensor)
    for name in tensors:  # other names of the same storage, planned or not, stay tied to it
        state[name] = written.get(identities[name], tensors[name])
    try:
        torch.save(content, target)
    except RuntimeError as error:  # torch's way to say that the disk is full
        raise OSError(str(error).splitlines()[0]) from error


def _rewrite_directory(source: Path, target: Path, quantizer: _Quantizer) -> None:
    indexed = (source / INDEX_NAME).is_file()
    shards = list(shard_files(source)) if indexed else [SINGLE_NAME]
    prefix = _prefix([source / shard for shard in shards])
    try:
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise SourceError(f"{target}: cannot write there ({error.strerror}). Choose another path.") from error
    try:
        with unchanged(source):
            for shard in shards:
                (temporary / shard).parent.mkdir(parents=True, exist_ok=True)
                _rewrite_safetensors(source / shard, temporary / shard, quantizer, prefix)
            _copy_others(source, temporary, {*shards})
        temporary.chmod(source.stat().st_mode & 0o777)
        temporary.replace(target)
    except OSError as error:
        raise SourceError(f"{target}: cannot write it ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_others(source: Path, target: Path, written: set[str]) -> None:
    """Configuration, tokenizer, index: whatever else makes the directory a model."""
    for path in source.rglob("*"):
        relative = path.relative_to(source)
        if path.is_file() and str(relative) not in written:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


def _prefix(files: Iterable[Path]) -> str:
    names: list[str] = []
    for path in files:
        names += safetensors_tensors(path)
    return common_prefix(names)
