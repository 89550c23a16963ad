"""mpq-plugins: decide once how many bits every layer, and every channel inside it, deserves.

    table = measure(model_or_path)
    plan = MixQuant(qem=2.0)(table)
    quantized = apply(model, plan)
    verify(quantized, plan)

Importing this package imports neither torch nor an adapter; each comes with the first use of what needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# These share their names with the modules they live in, so they are bound here before anything else
# can bind the module; each imports torch only when called.
from .apply import apply, verify
from .compress import compress, decompress
from .correct import correct
from .measurement.measure import measure
from .measurement.sensitivity import sensitivity
from .reconstruct import reconstruct

if TYPE_CHECKING:
    from .allocation.budget import Allocation, Budget
    from .allocation.contract import Allocator
    from .allocation.guard import Comparison, compare
    from .allocation.latency import LatencyTable
    from .allocation.mixquant import MixQuant
    from .allocation.ptilmpq import PTILMPQ
    from .allocation.sqnr import SQNR
    from .allocation.uniform import Uniform
    from .compress.container import Container
    from .compress.parametrized import finish
    from .compress.prune import Deviations, GlobalSparsity, Sparsity, prune
    from .compress.share import share
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
    from .models.input_ranges import InputRange, input_ranges, with_input_ranges, without_input_ranges
    from .plans.layers import LayerChoice, Part
    from .plans.plan import Plan
    from .plans.scheme import Affine, Codebook, Piecewise
    from .plans.size import PlanSize
    from .plans.table import LayerStats, LayerTable
    from .reconstruct import BlockReport
    from .synthetic import synthetic_batches
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

_HOMES = {
    "Affine": "plans.scheme",
    "Allocation": "allocation.budget",
    "Allocator": "allocation.contract",
    "BlockReport": "reconstruct",
    "Budget": "allocation.budget",
    "Codebook": "plans.scheme",
    "Comparison": "allocation.guard",
    "Container": "compress.container",
    "Deviations": "compress.prune",
    "FormatError": "errors",
    "GlobalSparsity": "compress.prune",
    "InputRange": "models.input_ranges",
    "LatencyTable": "allocation.latency",
    "LayerChoice": "plans.layers",
    "LayerStats": "plans.table",
    "LayerTable": "plans.table",
    "MPQError": "errors",
    "MismatchError": "errors",
    "MixQuant": "allocation.mixquant",
    "PTILMPQ": "allocation.ptilmpq",
    "Part": "plans.layers",
    "Piecewise": "plans.scheme",
    "Plan": "plans.plan",
    "PlanSize": "plans.size",
    "PlanWarning": "errors",
    "PluginError": "errors",
    "SQNR": "allocation.sqnr",
    "SettingError": "errors",
    "SourceError": "errors",
    "Sparsity": "compress.prune",
    "TuningError": "errors",
    "Uniform": "allocation.uniform",
    "VerifyError": "errors",
    "WeightError": "errors",
    "compare": "allocation.guard",
    "find_weights": "weights.find",
    "finish": "compress.parametrized",
    "input_ranges": "models.input_ranges",
    "iter_weights": "weights.find",
    "prune": "compress.prune",
    "share": "compress.share",
    "synthetic_batches": "synthetic",
    "with_input_ranges": "models.input_ranges",
    "without_input_ranges": "models.input_ranges",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
