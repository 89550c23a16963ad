"""Brevitas's tools for whole models, imported without its remark on a speed-up of rotations, which we do not use."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

from brevitas import config
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="fast_hadamard_transform")
    from brevitas.graph.base import ModuleToModuleByInstance
    from brevitas.graph.calibrate import (
        _BiasCorrection,
        bias_correction_mode,
        load_quant_model_mode,
        quantization_status_manager,
    )
    from brevitas.graph.gpfq import gpfq_mode
    from brevitas.graph.gptq import gptq_mode

__all__ = [
    "BiasCorrection", "ModuleToModuleByInstance", "bias_correction_mode", "brevitas_settings_kept", "float_inputs",
    "gpfq_mode", "gptq_mode", "load_quant_model_mode", "quiet_state_dict",
]  # fmt: skip


def float_inputs(model: nn.Module) -> Any:
    """A context in which the model's inputs are in floating point, and its weights quantized, in evaluation mode."""
    return quantization_status_manager(model, disable_act_quant=True, is_training=False)


_SETTINGS = RLock()  # Brevitas's are the process's: one at a time changes them


class BiasCorrection(_BiasCorrection):  # type: ignore[misc]
    """Brevitas's, in which every output counts the same, whatever batch it came in."""

    def forward_hook_wbiol(self, module: nn.Module, inp: Any, output: Tensor, name: str) -> Tensor:
        """Note the error of one call, and give the float output."""
        channels = output.shape[self.channel_dim(output, module)]
        self.weight = output.numel() // channels
        given: Tensor = super().forward_hook_wbiol(module, inp, output, name)
        self.iterations[name] += self.weight - 1
        return given

    def update_correction(self, name: str, error: Tensor) -> None:
        """Add an error, by the number of outputs that it is the mean of."""
        super().update_correction(name, error * self.weight)


@contextmanager
def brevitas_settings_kept() -> Iterator[None]:
    """Put Brevitas's global settings back, whatever happens."""
    with _SETTINGS:
        before = {name: value for name, value in vars(config).items() if name.isupper()}
        try:
            yield
        finally:
            vars(config).update(before)


@contextmanager
def quiet_state_dict() -> Iterator[None]:
    """Without what Brevitas's zero points say of themselves whenever a state dict is made."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Positional args are being deprecated", FutureWarning)
        yield
