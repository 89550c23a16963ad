"""Brevitas's tools for whole models, imported without its remark on a speed-up of rotations, which we do not use."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from brevitas import config

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="fast_hadamard_transform")
    from brevitas.graph.base import ModuleToModuleByInstance
    from brevitas.graph.calibrate import (
        bias_correction_mode,
        calibration_mode,
        load_quant_model_mode,
    )
    from brevitas.graph.gpfq import gpfq_mode
    from brevitas.graph.gptq import gptq_mode

__all__ = [
    "ModuleToModuleByInstance", "bias_correction_mode", "brevitas_settings_kept", "calibration_mode", "gpfq_mode",
    "gptq_mode", "load_quant_model_mode",
]  # fmt: skip


@contextmanager
def brevitas_settings_kept() -> Iterator[None]:
    """Put Brevitas's global settings back, whatever happens."""
    before = {name: value for name, value in vars(config).items() if name.isupper()}
    try:
        yield
    finally:
        vars(config).update(before)
