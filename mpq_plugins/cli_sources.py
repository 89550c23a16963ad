"""From words on the command line to sources, schemes and tables."""

import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .allocate.base import Needs
from .errors import SettingError, SourceError
from .files import exists
from .report.progress import progress_bar, say
from .scheme import Affine
from .table import LayerTable, is_table

if TYPE_CHECKING:
    from torch import nn

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Request:
    """What the shared options of `mpq measure` and `mpq plan` ask for; None means not said."""

    symmetric: bool | None = None
    granularity: str | None = None
    group_size: int | None = None
    range_name: str | None = None
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    fold_bn: str | None = None

    @property
    def scheme(self) -> Affine:
        """The scheme, with the library's defaults for what was not said; a group size alone means per_group."""
        granularity = self.granularity or ("per_tensor" if self.group_size is None else "per_group")
        return Affine(
            symmetric=bool(self.symmetric),
            granularity=granularity,  # type: ignore[arg-type]  # Affine checks it
            group_size=self.group_size,
            range=self.range_name or "minmax",  # type: ignore[arg-type]
        )

    @property
    def fold(self) -> bool | str:
        """fold_bn as `measure` takes it."""
        return {"yes": True, "no": False}.get(self.fold_bn or "auto", "auto")

    @property
    def empty(self) -> bool:
        """Whether nothing was said."""
        return self == Request()


def resolve_source(text: str) -> "Path | nn.Module":
    """A path, or the module that `package.module:factory` returns. Raises SourceError."""
    path = Path(text)
    if not FACTORY.fullmatch(text) or exists(path):
        return path
    from torch import nn

    module_name, _, factory_name = text.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does, so that a user's own file is found
    try:
        made = getattr(importlib.import_module(module_name), factory_name)()
    except (Exception, SystemExit) as error:
        raise SourceError(f"{text}: the factory cannot be called ({type(error).__name__}: {error})") from error
    finally:
        sys.path.pop(0)
    if not isinstance(made, nn.Module):
        raise SourceError(f"{text}: returned a {type(made).__name__}; a torch.nn.Module is needed")
    return made


def measured(source: str, needs: Needs, request: Request, cache: Path | None) -> LayerTable:
    """The table for a source: the source itself if it is one, the cache if it answers the request, or measured now."""
    path = Path(source)
    if is_table(path):
        return _given_table(path, needs, request, cache)
    resolved = resolve_source(source)
    if cache is not None and exists(cache):
        if not is_table(cache):
            raise SettingError(f"table: {cache} exists and is no table; name another file")
        table = LayerTable.load(cache)
        reason = _why_stale(table, resolved, needs, request)
        if reason is None:
            say(f"reusing the measurement in {cache}")
            return table
        say(f"measuring again: {cache} {reason}")
    table = measure_now(resolved, needs, request, None)
    if cache is not None:
        table.save(cache)
    return table


def check_output(output: Path | None, *inputs: str | Path | None) -> None:
    """Refuse to write a result over what it is made from, or over another result of the same run."""
    if output is None:
        return
    for path in (Path(path) for path in inputs if path is not None):
        existing = exists(output) and exists(path)
        if output.absolute() == path.absolute() or (existing and output.samefile(path)):
            raise SettingError(f"output: {output} is the source itself, or another result; name another file")


def measure_now(
    source: "Path | nn.Module", needs: Needs, request: Request, input_shape: tuple[int, ...] | None
) -> LayerTable:
    """Measure with a progress bar."""
    from . import measure

    example = None
    if input_shape is not None:
        import torch

        example = torch.zeros(input_shape)
    with progress_bar("measuring") as progress:
        return measure(
            source, request.scheme, needs.bits, needs.metrics, per_channel=needs.channel_errors,
            skip=request.skip, only=request.only, fold_bn=request.fold,  # type: ignore[arg-type]
            example_input=example, progress=progress,
        )  # fmt: skip


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
    return table


def _why_stale(table: LayerTable, source: "Path | nn.Module", needs: Needs, request: Request) -> str | None:
    from .measure.error import weights_fingerprint
    from .measure.run import resolve_fold
    from .weights import find_weights

    if table.scheme != request.scheme:
        return f"holds the scheme {table.scheme}"
    if not table.covers(needs.bits, needs.metrics, needs.channel_errors):
        return "lacks bit-widths or metrics"
    fold = resolve_fold(source, request.scheme, request.fold)  # type: ignore[arg-type]  # checked there
    found = find_weights(source, skip=request.skip, only=request.only, fold_bn=fold)
    if found.folded != table.fold_bn:
        return "was measured with another BatchNorm folding"
    if weights_fingerprint(found) != table.fingerprint or found.skipped != table.skipped:
        return "is of other weights"
    return None
