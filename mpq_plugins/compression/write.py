"""From weights to a container: quantized as the plan says, coded in the fewest bytes, read back before it is kept."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints.checkpoint import stored_tensors
from ..checkpoints.readers import DTYPES, StoredTensor
from ..common.checks import path_of, shown
from ..common.files import atomic_path, exists, unchanged
from ..common.progress import Progress, check_callbacks
from ..common.text import first_few
from ..errors import CompressWarning, SettingError, SourceError, VerifyError
from ..models.arguments import check_source
from ..models.fingerprint import tensor_bytes
from ..models.folding import folded_copy
from ..plans.arguments import check_plan
from ..plans.granular import FLOAT_BITS
from ..plans.layers import LayerChoice
from ..plans.names import weight_name
from ..plans.plan import Plan
from ..quantization.contract import PartCodes, PartShape
from ..simulation.checkpoint import require_unscaled
from ..simulation.floats import HALF, SINGLE, as_float
from ..simulation.match import Match, match
from ..simulation.parts import WeightPart, weight_parts
from ..simulation.planned_tensors import PlannedTensors
from ..weights.dtypes import check_weight
from ..weights.handles import Weight
from .bitpack import Codes
from .codes import encode
from .container import Container, numpy_dtype, part_shape, read_part
from .header import (
    CHECKSUM,
    PROLOGUE,
    Header,
    PartRecord,
    StreamRecord,
    TensorRecord,
    missing_layers,
    name_problem,
    write_block,
    write_header,
)
from .prune import Pruning, checked_thresholds, pruned
from .sparse import index_bits, to_relative
from .streams import CHOICES, Choice, Stream, code_stream, possible, value_stream

LOG = logging.getLogger(__name__)

MORE = 1.02  # than is promised, as a ratio: less is not worth a word
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Source:
    """What is to be written: tensors by name, layers' weights among them, and names of what is no tensor.

    plan: with the names that the layers have here.
    """

    tensors: Mapping[str, StoredTensor]
    weights: tuple[Weight, ...]
    left_out: tuple[str, ...]
    plan: Plan


def write(  # noqa: PLR0913  # as compress
    source: nn.Module | str | Path,
    plan: Plan,
    path: Path,
    *,
    prune: Pruning | None,
    coding: Choice,
    progress: Progress | None,
    model: nn.Module | None = None,
    weights: str | None = None,
    noted: Callable[[Match], None] | None = None,
) -> Container:
    """What `compress` promises; noted: told how the plan fits, the weights it was made from looked at too."""
    if coding not in CHOICES:
        raise SettingError(f"coding: {shown(coding)} is not allowed; {', '.join(CHOICES)}")
    if coding == "packed":
        _check_packed(plan)
    if isinstance(source, nn.Module):
        fit = match(plan, source, weights=noted is not None, rewrapped=True)
        contents = _of_module(source, fit)
    else:
        fit = match(plan, source, weights=noted is not None, key=weights, model=model)
        contents = _of_checkpoint(Path(source), fit)
        _check_target(Path(source), path)
    if noted is not None:
        noted(fit)
    thresholds = _thresholds(prune, contents) if prune is not None else {}
    made_with = {"mpq-plugins": version("mpq-plugins")} | ({"pruning": str(prune)} if prune is not None else {})
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file, unchanged(source):
            file.write(bytes(PROLOGUE))
            writer = _Writer(file, contents.plan, thresholds, coding, progress)
            writer.add_all(contents.tensors)
            writer.finish(made_with, contents.left_out)
        Container.open(temporary)  # before it takes the place of another
    return Container.open(path)


def broken_promise(container: Container) -> str | None:
    """What to say where codes take more than the plan promises, as those of weights that were rounded otherwise do."""
    promised = {layer.name: layer.coded_bytes for layer in container.plan.layers if layer.coded_bytes is not None}
    taken = sum(one for name, one in container.layer_bytes.items() if name in promised)
    most = sum(promised.values())
    if taken <= most * MORE + CHECKSUM.size * len(promised):
        return None
    return (
        f"the codes take {taken:,} bytes, and the plan promises {most:,}: the weights are rounded "
        "otherwise than when it was made. fit_file finds the steps for them"
    )


def _check_packed(plan: Plan) -> None:
    """Raise SettingError for a plan whose codes are made to be entropy coded."""
    promised = [layer for layer in plan.layers if layer.coded_bytes is not None]
    if promised:
        packed, coded = (sum(layer.numel * max(b for b, _ in layer.widths) for layer in promised) // 8,
                         sum(layer.coded_bytes or 0 for layer in promised))  # fmt: skip
        raise SettingError(
            f"coding: packed codes of the entropy-coded layers would take {packed:,} bytes, and their plan promises "
            f"{coded:,}; leave it at 'smallest', or plan widths (Budget(average_bits=...))"
        )


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as a safetensors file, in which tied ones are copies. Raises SourceError where that fails."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    with atomic_path(path) as temporary:
        save_file(apart, temporary, {"format": "pt"})


def _of_module(source: nn.Module, fit: Match) -> _Source:
    named = fit.require(type(source).__name__)
    state = (folded_copy(source, named) if named.fold_bn else source).state_dict()
    return _Source(stored_tensors(state), fit.present.weights, _no_tensors(state), named)


def _of_checkpoint(source: Path, fit: Match) -> _Source:
    named = fit.require(str(source))
    require_unscaled(fit)
    assert fit.checkpoint is not None
    tensors = dict(fit.checkpoint.tensors)
    for weight in fit.present:
        for name in weight.tied:  # a copy, perhaps, which is written once
            first, other = weight_name(weight.name), weight_name(name)
            if first in tensors and other in tensors:
                tensors[other] = replace(tensors[other], identity=tensors[first].identity)
    return _Source(tensors, fit.present.weights, fit.checkpoint.beside, named)


def _no_tensors(state: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    )


def _check_target(source: Path, target: Path) -> None:
    """Refuse to write over what is read."""
    if source.is_dir() and source.resolve() in target.resolve().parents:
        raise SettingError(f"output: {target} lies inside the source; name a file beside it")
    if exists(target) and source.samefile(target):
        raise SettingError(f"output: {target} is the source itself; name another file")


def _thresholds(prune: Pruning, source: _Source) -> dict[str, float]:
    """Planned layer -> the least magnitude that stays, of those that are quantized. Raises SettingError."""
    choices, weights = source.plan.by_any_name, source.weights
    planned = {
        weight.name: choices[name]
        for weight in weights
        for name in weight.names
        if name in choices and not choices[name].in_float
    }
    thresholds = checked_thresholds(prune, [weight for weight in weights if weight.name in planned])
    without = {name: _without_zero(planned[name]) for name, threshold in thresholds.items() if threshold}
    lacking = [f"{name!r} ({planned[name].scheme}, {bits} bits)" for name, bits in without.items() if bits is not None]
    if lacking:
        raise SettingError(
            "prune: there is no 0 at some widths, so pruned weights would come back: layers "
            f"{first_few(lacking, ', ')}. Plan without these widths (bits), with another scheme, or prune other layers."
        )
    return {planned[name].name: threshold for name, threshold in thresholds.items()}


def _without_zero(choice: LayerChoice) -> int | None:
    """A width of the layer's, or of a part's, at which no weight is 0."""
    widths = (part.bits for part in choice.all_parts if part.bits not in FLOAT_BITS)
    return next((bits for bits in widths if not choice.scheme.has_zero(bits)), None)


class _Writer:
    """Writes one tensor after another, and what is known of them at the end."""

    def __init__(
        self, file: BinaryIO, plan: Plan, thresholds: Mapping[str, float], coding: Choice, progress: Progress | None
    ) -> None:
        self.file, self.plan, self.thresholds, self.coding, self.progress = file, plan, thresholds, coding, progress
        self.records: dict[str, TensorRecord] = {}
        self.stacks: dict[str, int] = {}
        self.joined: list[str] = []
        self.planned = PlannedTensors(plan.by_any_name)
        self.done, self.total = 0, sum(layer.numel for layer in plan.layers)

    def add_all(self, tensors: Mapping[str, StoredTensor]) -> None:
        """The tensors of the source, one for each storage: under a planned name if it has one."""
        chosen: dict[object, str] = {}
        for name, stored in tensors.items():
            known = chosen.setdefault(stored.identity, name)
            if self.planned.has(name, stored.shape) and not self.planned.has(known, tensors[known].shape):
                chosen[stored.identity] = name
        for name, stored in tensors.items():
            if chosen[stored.identity] == name:
                self._add(name, stored)
            else:
                self._keep(TensorRecord(name=name, same=chosen[stored.identity]))

    def finish(self, made_with: Mapping[str, str], left_out: tuple[str, ...]) -> None:
        """The header. Raises SourceError where a planned layer's weight was not among the tensors."""
        missing = missing_layers(self.records.values(), self.plan)
        if missing:
            raise SourceError(f"no tensor is the weight of {first_few(missing, ', ')}; does a hook rename state dicts?")
        header = Header(
            made_with=dict(made_with), left_out=left_out, stacks=self.stacks,
            joined=tuple(self.joined), plan=self.plan.document(), tensors=tuple(self.records.values()),
        )  # fmt: skip
        write_header(self.file, header)
        if self.progress is not None:
            self.progress("", self.total, self.total)

    def _add(self, name: str, stored: StoredTensor) -> None:
        """A layer's weight, a stack of experts', or any other."""
        if stored.dtype not in DTYPE_NAMES:
            raise SourceError(f"tensor {name!r}: dtype {stored.dtype} has no place in safetensors files; convert it")
        choice = self.planned.layer(name)
        if choice is not None:
            self._layer(name, choice, stored.tensor())
        elif self.planned.is_stack(name, stored.shape):
            experts = list(self.planned.experts(name, stored.tensor()))
            self.stacks[name] = len(experts)
            if len(stored.shape) == 2:
                self.joined.append(name)
            for expert, one, matrix in experts:
                if one is not None:
                    self._layer(expert, one, matrix)
                else:
                    self._plain(expert, matrix)
        else:
            self._plain(name, stored.tensor())

    def _plain(self, name: str, tensor: Tensor) -> None:
        stream = _values(tensor, self.coding)
        self._write(TensorRecord(
            name=name, dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape), data=_record(stream)
        ), [stream])  # fmt: skip

    def _layer(self, name: str, choice: LayerChoice, tensor: Tensor) -> None:
        LOG.debug("%s: %d weights", choice.name, choice.numel)
        if self.progress is not None:
            self.progress(choice.name, self.done, self.total)
        check_weight(tensor, choice.name)
        weight = pruned(tensor, self.thresholds[choice.name]) if choice.name in self.thresholds else tensor
        records: list[PartRecord | StreamRecord] = []
        streams: list[Stream] = []
        for part in weight_parts(weight, choice):
            record, held = _part(choice, part, self.coding)
            records.append(record)
            streams += held
        written = TensorRecord(
            name=name, dtype=DTYPE_NAMES[tensor.dtype], parts=tuple(records),
            halves=tensor.dtype == SINGLE and any(part.bits == 16 for part in choice.all_parts),
        )  # fmt: skip
        self._write(written, streams)
        self.done += choice.numel

    def _write(self, record: TensorRecord, streams: Sequence[Stream]) -> None:
        write_block(self.file, streams)
        self._keep(record)

    def _keep(self, record: TensorRecord) -> None:
        problem = name_problem(record.name)
        if record.name in self.records:
            problem = "another is called so too: a stack of experts, and one of them apart?"
        if problem is not None:
            raise SourceError(f"tensor {record.name!r}: {problem}; rename it")
        self.records[record.name] = record


def _part(choice: LayerChoice, part: WeightPart, coding: Choice) -> tuple[PartRecord | StreamRecord, list[Stream]]:
    """How a part of a layer is stored, and its streams; read back, and compared with what was encoded."""
    if part.in_float:
        values = as_float(part.values, part.bits, choice.name)
        stream = _values(values.to(HALF) if part.bits == 16 and values.dtype == SINGLE else values, coding)
        return _record(stream), [stream]
    shape = part_shape(choice, part.part)
    codes = encode(part.values, shape)
    record, streams = _smallest(codes, shape, index_bits(choice.kind), coding)
    if not read_part(record, shape, iter(streams), index_bits(choice.kind), f"layer {choice.name!r}").equals(codes):
        raise VerifyError(f"layer {choice.name!r}: what was written reads back otherwise; please report this")
    return record, streams


def _smallest(codes: PartCodes, part: PartShape, gap_bits: int, coding: Choice) -> tuple[PartRecord, list[Stream]]:
    """All codes, or those that are not 0 and the gaps between them."""
    tables = value_stream(codes.tables, coding)
    zero_points = code_stream(codes.zero_points, part.bits, coding) if part.zero_points else None
    around = [tables, *([] if zero_points is None else [zero_points])]
    known: dict[str, Any] = {
        "tables": _record(tables),
        "zero_points": None if zero_points is None else _record(zero_points),
    }
    dense = code_stream(codes.symbols, part.width, coding)
    sparse = _sparse(codes.symbols, part.width, gap_bits, coding)
    if sparse is not None and possible(part.weights, sum(len(stream.data) for stream in sparse[1])):
        entries, (gaps, values) = sparse
        if len(gaps.data) + len(values.data) < len(dense.data):
            record = PartRecord(**known, gaps=_record(gaps), entries=entries, codes=_record(values))
            return record, [*around, gaps, values]
    return PartRecord(**known, codes=_record(dense)), [*around, dense]


def _sparse(symbols: Codes, width: int, gap_bits: int, coding: Choice) -> tuple[int, tuple[Stream, Stream]] | None:
    """The relative index, where half of the codes or more are 0."""
    if 2 * int((symbols != 0).sum()) > len(symbols):
        return None
    index = to_relative(symbols, gap_bits)
    return len(index.gaps), (code_stream(index.gaps, gap_bits, coding), code_stream(index.values, width, coding))


def _values(tensor: Tensor, coding: Choice) -> Stream:
    return value_stream(tensor_bytes(tensor).view(numpy_dtype(tensor.dtype)), coding)


def _record(stream: Stream) -> StreamRecord:
    return (stream.coding, len(stream.data))


def compress(  # noqa: PLR0913  # each option is a user's word
    source: nn.Module | str | Path,
    plan: Plan,
    path: str | Path,
    *,
    prune: Pruning | None = None,
    coding: Choice = "smallest",
    progress: Progress | None = None,
    model: nn.Module | None = None,
    weights: str | None = None,
) -> Container:
    """Write a model to one file as the plan has it: codes, scales and centroids, all other tensors, and the plan.

    What comes back by `decompress` is, to the bit, what `apply` makes of the (pruned) weights. What the source holds
    beside tensors is left out, with a CompressWarning, and named in the container's `header.left_out`. Nothing is left
    half written.

    Args:
        source: A module, or a checkpoint. A plan measured with BatchNorm folded in folds a module's.
        plan: The plan.
        path: The file to write.
        prune: Which weights of the quantized layers become 0 first.
        coding: `smallest` packs or entropy codes every tensor, whichever is smaller; `packed` packs all, so that sizes
            are the plan's.
        progress: Called with a layer's name, weights done and weights in all.
        model: Of a checkpoint, the module it is of, which says what of it are layers where the plan does not.
        weights: Of a torch checkpoint with several sets of weights, the key of those that are meant, where they are not
            those the plan was made from.

    Returns:
        The container, opened.

    Raises:
        MismatchError: The plan is for another model.
        SettingError: Pruning would leave nothing, or weights are to be pruned whose scheme has no 0.
        WeightError: A weight holds NaN.
        SourceError: The source cannot be read, or the file not written.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> container = mpq.compress(net, mpq.Uniform(bits=4)(mpq.measure(net)), "net.mpqc", prune=mpq.Sparsity(0.5))
        >>> container.size < 4 * 64 * 64
        True
    """
    check_source(source)
    check_plan(plan)
    check_callbacks(progress=progress)
    container = write(
        source, plan, path_of("path", path), prune=prune, coding=coding, progress=progress, model=model, weights=weights
    )
    broken = broken_promise(container)
    if broken is not None:
        warnings.warn(CompressWarning(broken), stacklevel=2)
    if container.header.left_out:
        text = f"left out, no tensors of the model: {', '.join(container.header.left_out)}"
        warnings.warn(CompressWarning(text), stacklevel=2)
    return container
