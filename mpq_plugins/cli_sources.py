"""From words on the command line to sources, schemes and tables."""

import dataclasses
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .allocation.contract import Needs
from .cli_partial import kept_at, partial_file, save_measured
from .common.files import claimed, exists, source_files
from .common.outsiders import contained, outsiders
from .errors import SettingError, SourceError
from .plans.scheme import SCHEMES, Affine, Codebook, Scheme
from .plans.table import LayerTable, is_table
from .report.progress import progress_bar, say

if TYPE_CHECKING:
    from torch import Tensor, nn

PRINTED = 128  # bits of a number; of thousands of digits Python makes no text
MOST_VALUES = 1 << 28  # of an input whose multiply-accumulates are counted: a gibibyte in float
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Request:
    """What the shared options of `mpq measure` and `mpq plan` ask for; None means not said."""

    scheme_name: str | None = None
    symmetric: bool | None = None
    granularity: str | None = None
    group_size: int | None = None
    range_name: str | None = None
    breakpoint_rule: str | None = None
    storage: str | None = None
    init: str | None = None
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    fold_bn: str | None = None
    weights: str | None = None
    already_quantized: bool | None = None

    def scheme(self, default: Scheme | None) -> Scheme:
        """The scheme that was asked for: what was not said is the default's, or the library's.

        A group size alone means per_group. Raises SettingError for an option of another scheme.
        """
        base = default or Affine()
        if self.scheme_name not in (None, base.name):
            if self.scheme_name not in SCHEMES:
                raise SettingError(f"scheme: {self.scheme_name!r} is not allowed; {', '.join(SCHEMES)}")
            chosen = SCHEMES[self.scheme_name]
            # A codebook for each channel would take more than its codes, so that is only done where it is asked for.
            base = chosen() if chosen is Codebook else chosen(granularity=base.granularity, group_size=base.group_size)
        own = _field_names(base)
        said = {name: value for name, value in self._scheme_fields.items() if value is not None}
        for name in said:
            if name not in own:
                owner = next(key for key, scheme in SCHEMES.items() if name in _field_names(scheme))
                raise SettingError(
                    f"{name}: means nothing with the {base.name} scheme; leave it out, or add --scheme {owner}"
                )
        if self.granularity is not None or self.group_size is not None:
            said |= {"granularity": self.granularity or "per_group", "group_size": self.group_size}
        return dataclasses.replace(base, **said)

    @property
    def _scheme_fields(self) -> dict[str, Any]:
        return {
            "symmetric": self.symmetric, "range": self.range_name, "breakpoint": self.breakpoint_rule,
            "storage": self.storage, "init": self.init,
        }  # fmt: skip

    @property
    def fold(self) -> bool | str:
        """fold_bn as `measure` takes it."""
        return {"yes": True, "no": False}.get(self.fold_bn or "auto", "auto")

    @property
    def empty(self) -> bool:
        """Whether nothing was said."""
        return self == Request()


def _field_names(scheme: Scheme | type[Scheme]) -> set[str]:
    return {field.name for field in dataclasses.fields(scheme)}


def resolve_source(text: str) -> "Path | nn.Module":
    """A path, or the module that `package.module:factory` returns. Raises SourceError."""
    path = Path(text)
    if not FACTORY.fullmatch(text) or exists(path):
        return path
    return make_module(text)


def make_module(text: str) -> "nn.Module":
    """The module that `package.module:factory` returns, in evaluation mode, as it will run. Raises SourceError."""
    from torch import nn

    factory = named_function(text)
    with outsiders(lambda said: SourceError(f"{text}: the factory cannot be called ({said})")):
        made = factory()
    if not isinstance(made, nn.Module):
        raise SourceError(f"{text}: returned a {type(made).__name__}; a torch.nn.Module is needed")
    with outsiders(lambda said: SourceError(f"{text}: returned a module that cannot be looked into ({said})")):
        made.eval().state_dict()  # one that contains itself ends here
        list(made.named_modules())
    return made


def named_function(text: str) -> Callable[..., Any]:
    """What `package.module:function` names. Raises SourceError."""
    if not FACTORY.fullmatch(text):
        raise SourceError(
            f"{text}: names no function; write package.module:function as Python imports it, mine:score for a function "
            "score in mine.py here"
        )
    module_name, _, name = text.partition(":")
    with outsiders(lambda said: SourceError(f"{text}: the function cannot be found ({said})")), _importing_from_here():
        found = getattr(importlib.import_module(module_name), name)
    if not callable(found):
        raise SourceError(f"{text}: is a {type(found).__name__}; a function is needed")
    return contained(found)


@contextmanager
def _importing_from_here() -> Iterator[None]:
    """As `python -m` does, so that a user's own file is found."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with suppress(ValueError):  # what was imported may have changed the path, too
            sys.path.remove(here)


def measured(source: "str | Path | nn.Module", needs: Needs, request: Request, cache: Path | None) -> LayerTable:
    """The table for a source: the source itself if it is one, the cache if it answers the request, or measured now."""
    if isinstance(source, str) and is_table(Path(source)):
        return _given_table(Path(source), needs, request, cache)
    resolved = resolve_source(source) if isinstance(source, str) else source
    if cache is not None and exists(cache):
        if not is_table(cache):
            raise SettingError(f"table: {cache} exists and is no table; remove it, or name another file")
        table = LayerTable.load(cache)
        reason = _why_stale(table, resolved, needs, request)
        if reason is None:
            say(f"reusing the measurement in {cache}")
            return table
        say(f"measuring again: {cache} {reason}")
    journal = partial_file(cache)
    check_output(journal, source if isinstance(source, str) else None)
    with nullcontext() if cache is None else claimed(cache):
        table = measure_now(resolved, needs, request, None, journal=journal)
        save_measured(table, cache)
    return table


def check_output(output: Path | None, *inputs: str | Path | None) -> None:
    """Refuse to write a result over what it is made from or another result of the same run, or where it cannot be.

    inputs: files, directories of weights and what lies in them, and `package.module:function` in a file here. A text
    that is none of these, such as an option's other values, protects nothing.
    """
    if output is None:
        return
    if not output.absolute().parent.is_dir():  # found now, and not after the work
        raise SourceError(f"{output}: there is no folder {output.parent}. Make it, or choose another path.")
    for given in inputs:
        if given is None:
            continue
        if output.absolute() == Path(given).absolute() or _same(output, Path(given)):
            raise SettingError(f"output: {output} is the source itself, or another result; name another file")
        if any(_same(output, path) for path in _files_of(given)):
            raise SettingError(f"output: {output} is part of {given}, which is read; name another file")


def _files_of(given: str | Path) -> list[Path]:
    """What is read where this is given."""
    if isinstance(given, str) and FACTORY.fullmatch(given):
        return [Path(*given.partition(":")[0].split(".")).with_suffix(".py")]
    return source_files(Path(given))


def _same(output: Path, path: Path) -> bool:
    """Whether both are one file, under whatever names."""
    return exists(output) and exists(path) and output.samefile(path)


def named_files(values: Mapping[str, Any]) -> list[str]:
    """Of an allocator's options, those that name files that are there, such as a table of latencies."""
    given = [value for own in values.values() for value in (own if isinstance(own, list | tuple) else (own,))]
    return [value for value in given if isinstance(value, str) and exists(Path(value))]


def measure_now(
    source: "Path | nn.Module",
    needs: Needs,
    request: Request,
    input_shape: tuple[int, ...] | None,
    *,
    journal: Path | None = None,
    executor: Executor | None = None,
    device: str | None = None,
) -> LayerTable:
    """Measure with a progress bar."""
    from . import measure

    example = _zeros(input_shape) if input_shape is not None else None
    with kept_at(journal), progress_bar("measuring") as progress:
        table = measure(
            source, request.scheme(needs.scheme), needs.bits, needs.metrics, per_channel=needs.channel_errors,
            skip=request.skip, only=request.only, fold_bn=request.fold,  # type: ignore[arg-type]
            weights=request.weights, already_quantized=bool(request.already_quantized),
            example_input=example, journal=journal, executor=executor, device=device, progress=progress,
        )  # fmt: skip
    _say_file(source)
    return table


def _say_file(source: "Path | nn.Module") -> None:
    """Which file of a directory is read, where it has another name than weights have."""
    from .checkpoints.shards import USUAL, weight_files

    if isinstance(source, Path) and exists(source) and source.is_dir():
        file = weight_files(source).chosen
        if file.name not in USUAL:
            say(f"weights: {file.name}, the only ones in {source}")


def _zeros(shape: tuple[int, ...]) -> "Tensor":
    """An input of this shape."""
    import torch

    count = math.prod(shape)
    if count > MOST_VALUES:
        values = f"{count:,} values" if count.bit_length() < PRINTED else f"more than 2^{PRINTED - 1} values"
        raise SettingError(f"input-shape: {list(shape)!s:.80} has {values}; at most {MOST_VALUES:,}")
    return torch.zeros(shape)


def _given_table(path: Path, needs: Needs, request: Request, cache: Path | None) -> LayerTable:
    if not request.empty or cache is not None:
        raise SettingError(
            f"{path} is a table, already measured; scheme, skip, only, fold-bn and table options go with a model"
        )
    table = LayerTable.load(path)
    if not table.covers(needs.bits, needs.metrics, needs.channel_errors):
        raise SettingError(
            f"{path}: was measured at bits {list(table.bits)} with {', '.join(table.metrics)}; the allocator needs "
            f"bits {list(needs.bits)} with {', '.join(needs.metrics)}"
            f"{' per channel' if needs.channel_errors else ''}. Measure again."
        )
    if needs.scheme is not None and type(needs.scheme) is not type(table.scheme):
        say(f"note: {path} was measured under {table.scheme}, so that is the plan's scheme, not {needs.scheme}")
    return table


def _why_stale(table: LayerTable, source: "Path | nn.Module", needs: Needs, request: Request) -> str | None:
    from .measurement.error import weights_fingerprint
    from .measurement.measure import resolve_fold
    from .weights.find import find_weights

    scheme = request.scheme(needs.scheme)
    if table.scheme != scheme:
        return f"holds the scheme {table.scheme}"
    if not table.covers(needs.bits, needs.metrics, needs.channel_errors):
        return "lacks bit-widths or metrics"
    fold = resolve_fold(source, scheme, request.fold)  # type: ignore[arg-type]  # checked there
    found = find_weights(
        source, skip=request.skip, only=request.only, fold_bn=fold, weights=request.weights,
        already_quantized=bool(request.already_quantized),
    )  # fmt: skip
    if found.folded != table.fold_bn:
        return "was measured with another BatchNorm folding"
    if weights_fingerprint(found) != table.fingerprint or found.skipped != table.skipped:
        return "is of other weights"
    return None
