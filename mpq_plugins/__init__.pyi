"""The public names, each from where it is defined: the one list of them, which is read as the package is imported."""

from .allocation.budget import Allocation, Budget
from .allocation.contract import Allocator
from .allocation.guard import Comparison, compare
from .allocation.latency import LatencyTable
from .allocation.mixquant import MixQuant
from .allocation.ptilmpq import PTILMPQ
from .allocation.sqnr import SQNR
from .allocation.uniform import Uniform
from .compression.container import Container, decompress
from .compression.parametrized import finish
from .compression.prune import Deviations, GlobalSparsity, Sparsity, prune
from .compression.share import share
from .compression.write import compress
from .errors import (
    FormatError,
    MismatchError,
    MPQError,
    PlanWarning,
    PluginError,
    SettingError,
    SourceError,
    TuningError,
    VerifyError,
    WeightError,
)
from .measurement.measure import measure
from .measurement.sensitivity import sensitivity
from .models.input_ranges import InputRange, input_ranges, with_input_ranges, without_input_ranges
from .plans.layers import LayerChoice, Part
from .plans.plan import Plan
from .plans.scheme import Affine, Codebook, Piecewise
from .plans.size import PlanSize
from .plans.stats import LayerStats
from .plans.table import LayerTable
from .reconstruction.brecq import reconstruct
from .reconstruction.settings import BlockReport
from .simulation.apply import apply, verify
from .simulation.correct import correct
from .simulation.synthetic import synthetic_batches
from .weights.find import find_weights, iter_weights

__all__ = [
    "PTILMPQ",
    "SQNR",
    "Affine",
    "Allocation",
    "Allocator",
    "BlockReport",
    "Budget",
    "Codebook",
    "Comparison",
    "Container",
    "Deviations",
    "FormatError",
    "GlobalSparsity",
    "InputRange",
    "LatencyTable",
    "LayerChoice",
    "LayerStats",
    "LayerTable",
    "MPQError",
    "MismatchError",
    "MixQuant",
    "Part",
    "Piecewise",
    "Plan",
    "PlanSize",
    "PlanWarning",
    "PluginError",
    "SettingError",
    "SourceError",
    "Sparsity",
    "TuningError",
    "Uniform",
    "VerifyError",
    "WeightError",
    "apply",
    "compare",
    "compress",
    "correct",
    "decompress",
    "find_weights",
    "finish",
    "input_ranges",
    "iter_weights",
    "measure",
    "prune",
    "reconstruct",
    "sensitivity",
    "share",
    "synthetic_batches",
    "verify",
    "with_input_ranges",
    "without_input_ranges",
]
