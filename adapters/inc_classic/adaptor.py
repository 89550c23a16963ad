"""The classic API's weight-only adaptor, for plans: every layer kind of ours, quantized as the plan says."""

import copy
from typing import Any

import torch

from mpq_plugins.models.kinds import KINDS
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.model import simulated

from ..shared.compressor_quiet import quiet_import
from ..shared.fitting import fitted

with quiet_import():
    from neural_compressor.adaptor.pytorch import PyTorchWeightOnlyAdaptor

PLAN = "mpq_plan"
"""Where a trial's configuration carries its plan, as JSON: the tuner copies, compares and pickles configurations."""


def carried_plan(tune_cfg: dict[str, Any]) -> Plan:
    """The plan in a trial's configuration."""
    return Plan.model_validate_json(tune_cfg[PLAN])


class PlanAdaptor(PyTorchWeightOnlyAdaptor):  # type: ignore[misc]  # Neural Compressor has no types
    """Neural Compressor's own knows linear layers alone, one width each."""

    def __init__(self, framework_specific_info: dict[str, Any]) -> None:
        super().__init__(framework_specific_info)
        self.white_list = list(KINDS)

    @torch.inference_mode(False)
    def quantize(self, tune_cfg: dict[str, Any], model: Any, dataloader: Any, calib_func: Any = None) -> Any:
        """A quantized copy of the model, in Neural Compressor's wrapper."""
        network, plan = model.model, carried_plan(tune_cfg)
        # A copy of the wrapper around the quantized module, in the place of a copy of the user's.
        q_model = copy.deepcopy(model, {id(network): simulated(fitted(network, plan), plan)})
        q_model.q_config = copy.deepcopy(tune_cfg)
        q_model.is_quantized = True
        return q_model
