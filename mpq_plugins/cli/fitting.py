"""--calibrate, --synthetic and --rounding: how weights are rounded to a plan's grids, and on which inputs."""

import functools
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from ..errors import SettingError
from ..reconstruction.rounding import COMPENSATED, CORRECTED, ROUNDINGS, Rounding, checked_rounding, rounding_label
from ..report.progress import progress_bar
from .scheme_options import Command
from .types import IntegerList, OneOf

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from concurrent.futures import Executor

    from torch import nn

    from ..plans.plan import Plan

FILE = ParameterSource.DEFAULT_MAP
OPTIONS = (
    click.option(
        "--calibrate", "calibration", metavar="MODULE:FUNCTION",
        help="Batches of inputs, without labels, to round and correct on.",
    ),
    click.option(
        "--synthetic", type=IntegerList(), metavar="SHAPE",
        help="Instead, inputs (128,3,32,32) made of BatchNorm statistics.",
    ),
    click.option(
        "--rounding", type=OneOf(ROUNDINGS), metavar="HOW",
        help="nearest, compensated (default with inputs), or learned.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Fitting:
    """What the three options say, of which two exclude each other. Raises SettingError for what contradicts itself."""

    calibration: str | None = None
    synthetic: tuple[int, ...] | None = None
    asked: str | None = None

    def __post_init__(self) -> None:
        if self.calibration is not None and self.synthetic is not None:
            raise SettingError("calibrate: --calibrate and --synthetic both say what to calibrate on; give one")
        checked_rounding(self.asked, calibrated=self.calibrated)

    @property
    def calibrated(self) -> bool:
        """Whether there are inputs."""
        return self.calibration is not None or self.synthetic is not None

    @property
    def rounding(self) -> Rounding:
        """The rounding that was asked for, or the default."""
        return checked_rounding(self.asked, calibrated=self.calibrated)

    @property
    def label(self) -> str:
        """What tables call it."""
        return rounding_label(self.rounding, calibrated=self.calibrated)

    def batches(self, model: "nn.Module") -> list[Any] | None:
        """The inputs for this model, None without any. Raises SourceError and SettingError, naming what they are of."""
        from .calibration import calibration_batches, synthetic_inputs

        if self.synthetic is not None:
            return synthetic_inputs(model, self.synthetic)
        return calibration_batches(self.calibration) if self.calibration is not None else None

    def check_workers(self, workers: int | None, dask: str | None) -> None:
        """Raise SettingError for workers where they have nothing to do: no weights are compensated."""
        if (workers, dask) != (None, None) and self.label != COMPENSATED:
            option = "workers" if workers is not None else "dask"
            raise SettingError(
                f"{option}: share compensated rounding, and this one is {self.label}; add --calibrate package.module:"
                "function with --rounding compensated, or leave it out"
            )

    def fitted(
        self, model: "nn.Module", plan: "Plan", executor: "Executor | None" = None, new_biases: bool = True
    ) -> "nn.Module":
        """A float copy that rounds so under the plan, with a progress bar; inputs are given. Raises as `apply`.

        executor: whose workers do a part of it; new_biases: as in `compensate`. Both where the rounding is compensated.
        """
        from ..reconstruction.apply import round_weights
        from ..reconstruction.compensate import compensate

        batches = cast(list[Any], self.batches(model))
        doing = "correcting" if self.label == CORRECTED else "rounding"
        with progress_bar(doing) as progress, redirect_stdout(sys.stderr):
            if self.rounding == COMPENSATED:
                return compensate(model, plan, batches, new_biases=new_biases, executor=executor, progress=progress)
            return round_weights(model, plan, batches, self.rounding, progress=progress)


def _said(calibration: str | None, synthetic: tuple[int, ...] | None, rounding: str | None) -> Fitting:
    """What the options say. A file's defaults give way to the command line, and its rounding waits for inputs."""
    source = click.get_current_context().get_parameter_source
    by_default = {name for name in ("calibration", "synthetic", "rounding") if source(name) is FILE}
    if calibration is not None and synthetic is not None:
        calibration = None if by_default & {"calibration", "synthetic"} == {"calibration"} else calibration
        synthetic = None if by_default & {"calibration", "synthetic"} == {"synthetic"} else synthetic
    if "rounding" in by_default and calibration is None and synthetic is None:
        rounding = None
    return Fitting(calibration, synthetic, rounding)


def fitting_options(command: Command) -> Command:
    """Give a command the three options, as one argument, `fitting`."""

    @functools.wraps(command)
    def fitted(*arguments: Any, calibration: Any, synthetic: Any, rounding: Any, **options: Any) -> Any:
        return command(*arguments, fitting=_said(calibration, synthetic, rounding), **options)

    made: Any = fitted
    for option in reversed(OPTIONS):
        made = option(made)
    return cast(Command, made)
