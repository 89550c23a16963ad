"""The public names, each from where it is defined: the one list of them, which is read as the package is imported."""

from .adapters.contract import Adapter, ConfigWriter, Exported, Exporter, LayerCheck
from .allocation.budget import Allocation, Budget
from .allocation.contract import Allocator, Needs
from .allocation.guard import Comparison, compare
from .allocation.latency import LatencyTable
from .allocation.make import make_plan
from .allocation.mixquant import MixQuant
from .allocation.ptilmpq import PTILMPQ
from .allocation.sqnr import SQNR
from .allocation.uniform import Uniform
from .common.store import Store
from .compression.container import Container, decompress
from .compression.fit import FittedFile, fit_file
from .compression.parametrized import finish
from .compression.prune import Deviations, GlobalSparsity, Sparsity, prune
from .compression.share import share
from .compression.write import compress
from .errors import (
    CompressWarning,
    FormatError,
    MeasureWarning,
    MismatchError,
    MPQError,
    PlanWarning,
    PluginError,
    RoundingWarning,
    SettingError,
    SourceError,
    TuningError,
    VerifyError,
    WeightError,
    WorkerError,
)
from .evaluation.evaluate import EvaluatedPlan, evaluate
from .evaluation.pareto import LabelledPlan, pareto
from .evaluation.sweep import SweepRow, sweep
from .importing.autoround import import_autoround
from .importing.imatrix_error import import_imatrix
from .importing.modelopt import import_modelopt
from .importing.olive import import_olive
from .measurement.activations import measure_activations
from .measurement.contract import Curves, Job, Sensitivity
from .measurement.measure import measure
from .measurement.measure_types import measure_types
from .measurement.sensitivity import sensitivity
from .models.input_ranges import InputRange, input_ranges, with_input_ranges, without_input_ranges
from .plans.activations import Activations
from .plans.affine import Affine
from .plans.capabilities import Capabilities, Change
from .plans.codebook import Codebook
from .plans.entropy_coded import EntropyCoded
from .plans.ggml import GGML
from .plans.granular import Granular
from .plans.layers import LayerChoice, Part
from .plans.legalise import legalise
from .plans.minifloat import Minifloat
from .plans.piecewise import Piecewise
from .plans.plan import Difference, Plan
from .plans.scheme import Scheme
from .plans.size import LayerSize, PlanSize
from .plans.stats import CodedCurve, InputStats, LayerStats
from .plans.storage import Storage
from .plans.table import LayerTable
from .plans.type_table import TypeColumn, TypeTable
from .plans.types import NamedType, named_type
from .quantization.contract import PartCodes, PartShape, Quantizer
from .quantization.row_quantizer import RowQuantizer
from .reconstruction.apply import apply, round_weights
from .reconstruction.brecq import reconstruct
from .reconstruction.compensate import compensate
from .reconstruction.settings import BlockReport, LayerReport
from .simulation.calibrate import calibrate_inputs
from .simulation.correct import correct
from .simulation.synthetic import synthetic_batches
from .simulation.verify import PartCheck, verify
from .weights.find import find_weights, iter_weights
from .weights.handles import Weight, Weights

__all__ = [
    "GGML",
    "PTILMPQ",
    "SQNR",
    "Activations",
    "Adapter",
    "Affine",
    "Allocation",
    "Allocator",
    "BlockReport",
    "Budget",
    "Capabilities",
    "Change",
    "Codebook",
    "CodedCurve",
    "Comparison",
    "CompressWarning",
    "ConfigWriter",
    "Container",
    "Curves",
    "Deviations",
    "Difference",
    "EntropyCoded",
    "EvaluatedPlan",
    "Exported",
    "Exporter",
    "FittedFile",
    "FormatError",
    "GlobalSparsity",
    "Granular",
    "InputRange",
    "InputStats",
    "Job",
    "LabelledPlan",
    "LatencyTable",
    "LayerCheck",
    "LayerChoice",
    "LayerReport",
    "LayerSize",
    "LayerStats",
    "LayerTable",
    "MPQError",
    "MeasureWarning",
    "Minifloat",
    "MismatchError",
    "MixQuant",
    "NamedType",
    "Needs",
    "Part",
    "PartCheck",
    "PartCodes",
    "PartShape",
    "Piecewise",
    "Plan",
    "PlanSize",
    "PlanWarning",
    "PluginError",
    "Quantizer",
    "RoundingWarning",
    "RowQuantizer",
    "Scheme",
    "Sensitivity",
    "SettingError",
    "SourceError",
    "Sparsity",
    "Storage",
    "Store",
    "SweepRow",
    "TuningError",
    "TypeColumn",
    "TypeTable",
    "Uniform",
    "VerifyError",
    "Weight",
    "WeightError",
    "Weights",
    "WorkerError",
    "apply",
    "calibrate_inputs",
    "compare",
    "compensate",
    "compress",
    "correct",
    "decompress",
    "evaluate",
    "find_weights",
    "finish",
    "fit_file",
    "import_autoround",
    "import_imatrix",
    "import_modelopt",
    "import_olive",
    "input_ranges",
    "iter_weights",
    "legalise",
    "make_plan",
    "measure",
    "measure_activations",
    "measure_types",
    "named_type",
    "pareto",
    "prune",
    "reconstruct",
    "round_weights",
    "sensitivity",
    "share",
    "sweep",
    "synthetic_batches",
    "verify",
    "with_input_ranges",
    "without_input_ranges",
]
