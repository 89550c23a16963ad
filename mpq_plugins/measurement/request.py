"""What is asked of a measurement: under which scheme, of which weights, at which bit-widths."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from torch import nn

from ..common.checks import listed, shown, words
from ..errors import SettingError
from ..models.folding import has_batch_norm
from ..plans.scheme import Scheme
from ..plans.stats import METRICS
from ..plans.table import LayerTable
from ..weights.find import find_weights
from ..weights.handles import Weights

FoldBN = bool | Literal["auto"]
DEFAULT_BITS = range(2, 9)
WIDTHS = "a list of one or more of 1 to 8"
DEFAULT_METRICS = ("relative", "mse")


@dataclass(frozen=True)
class MeasureRequest:
    """All that decides what a table of a source holds; the fields are arguments of `measure`. To be `checked`."""

    scheme: Scheme
    bits: Sequence[int] = DEFAULT_BITS
    metrics: Sequence[str] = DEFAULT_METRICS
    per_channel: bool = False
    skip: Sequence[str] = ()
    only: Sequence[str] = ()
    fold_bn: FoldBN = "auto"
    weights: str | None = None
    model: nn.Module | None = None
    already_quantized: bool = False

    def checked(self) -> Self:
        """The same in order. Raises SettingError for bit-widths or metrics that there are not, or none."""
        _check_scheme(self.scheme)
        return replace(self, bits=_checked_bits(self.bits, self.scheme), metrics=_checked_metrics(self.metrics))

    def folds(self, source: nn.Module | str | Path) -> bool:
        """Whether to fold: "auto" folds a module's BatchNorm for per_tensor, and nothing else. Raises SettingError."""
        if self.fold_bn == "auto":
            granular = self.scheme.granularity != "per_tensor"
            return isinstance(source, nn.Module) and not granular and has_batch_norm(source)
        if not isinstance(self.fold_bn, bool):
            raise SettingError(f"fold_bn: {shown(self.fold_bn)} is not allowed; True, False or 'auto'")
        return self.fold_bn

    def find(self, source: nn.Module | str | Path) -> Weights:
        """The weights that are meant. Raises as find_weights."""
        return find_weights(
            source, skip=self.skip, only=self.only, fold_bn=self.folds(source), weights=self.weights, model=self.model,
            already_quantized=self.already_quantized,
        )  # fmt: skip

    def is_covered_by(self, table: LayerTable) -> bool:
        """Whether a table has all bit-widths and metrics that are asked for."""
        return table.covers(tuple(self.bits), tuple(self.metrics), self.per_channel)


def _check_scheme(scheme: object) -> None:
    """Raise SettingError for what is no scheme; a class of schemes is none."""
    if isinstance(scheme, type) or not isinstance(scheme, Scheme):
        kind = scheme.__name__ if isinstance(scheme, type) else type(scheme).__name__
        raise SettingError(f"scheme: {kind} is no scheme; a value such as Affine(granularity='per_channel')")


def _checked_bits(bits: Sequence[int], scheme: Scheme) -> tuple[int, ...]:
    """Distinct bit-widths, ascending. Raises SettingError outside what the scheme has, or for none."""
    given = listed("bits", bits, WIDTHS)
    if not given:
        raise SettingError(f"bits: {shown(bits)} is not allowed; {WIDTHS}")
    return tuple(sorted({scheme.check_bits(b) for b in given}))


def _checked_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    """The metrics, in the order METRICS has them. Raises SettingError for an unknown one or for none."""
    given = words("metrics", metrics, f"a list of {', '.join(METRICS)}")
    for metric in given:
        if metric not in METRICS:
            raise SettingError(f"metrics: {shown(metric)} is not allowed; {', '.join(METRICS)}")
    if not given:
        raise SettingError(f"metrics: none given; one or more of {', '.join(METRICS)}")
    return tuple(metric for metric in METRICS if metric in given)
