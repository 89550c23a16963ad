"""A plan as Neural Compressor's own weight-only configurations: its widths, with the compressor's own scales."""

import re
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpq_plugins.common.checks import shown
from mpq_plugins.common.text import first_few
from mpq_plugins.errors import MismatchError, SettingError
from mpq_plugins.models.plain import why_not_plain
from mpq_plugins.models.tracing import Traced
from mpq_plugins.plans.affine import Affine
from mpq_plugins.plans.arguments import check_plan
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.legalise import require_legal
from mpq_plugins.plans.names import weight_name
from mpq_plugins.plans.plan import Plan
from mpq_plugins.weights.dtypes import check_weight

from ..shared.compressor_quiet import quiet_import
from ..shared.folded import check_model, check_sizes, lent_weights, planned_layers, refuse_entropy_coded, refuse_float16
from .names import check_float

with quiet_import():
    from neural_compressor.torch.algorithms.weight_only import rtn
    from neural_compressor.torch.quantization.config import RTNConfig
    from neural_compressor.torch.utils.constants import LM_HEAD_NAMES

# Of the others, GPTQ and AWQ fail on plain models, and HQQ in the forward of layers that its packing does not divide.
ALGOS = ("rtn",)

RTN_CAPABILITIES = Capabilities(
    backend="Neural Compressor's RTN",
    bits=tuple(range(2, 9)),
    kinds=("linear",),
    granularities=("per_channel", "per_group"),
    stochastic=False,
)
DTYPES = (torch.float32, torch.float16)
# torch.nn.MultiheadAttention reads this layer's weight itself, and finds none once it is packed.
READ_BY_OTHERS = "NonDynamicallyQuantizableLinear"


def to_inc(plan: Plan, algo: str = "rtn", model: nn.Module | None = None) -> RTNConfig:
    """Make the plan an RTNConfig for Neural Compressor's own quantize, save and load, which pack the codes.

    Widths, groups and symmetry are the plan's, names match exactly, layers that the plan leaves out are left alone. The
    codes are the plan's (but for near ties, which `verify` counts); their scales, and the layers' biases, the
    compressor keeps in float16. `apply` is exact. Linear layers of float32 or float16 at 2 to 8 bits, 8 bits symmetric
    alone, per channel or per group, min-max. When a model is quantized, WeightError is raised for NaN and infinity.

    Args:
        plan: The plan.
        algo: Neural Compressor's algorithm; `rtn` alone.
        model: The float model: check now that the plan is its. Names that it lacks are found when it is quantized
            anyhow.

    Returns:
        The configuration.

    Raises:
        SettingError: The compressor would skip, round, untie or compute something wrongly.
        MismatchError: The plan is another model's.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import inc
        >>> net = torch.nn.Sequential(torch.nn.Linear(32, 32)).eval()
        >>> table = mpq.measure(net, mpq.Affine(granularity="per_channel"))
        >>> inc.to_inc(mpq.Uniform(bits=4)(table)).name
        'rtn'
    """
    check_plan(plan)
    if algo not in ALGOS:
        raise SettingError(f"algo: {shown(algo)} is not allowed; {', '.join(ALGOS)}")
    refuse_entropy_coded(plan, "Neural Compressor's RTN", "inc.RTN_CAPABILITIES")
    require_legal(plan, RTN_CAPABILITIES)
    refuse_float16(plan, "Neural Compressor's RTN", "apply()")
    check_sizes(plan, "Neural Compressor's RTN")
    planned = planned_layers(plan)
    tied = [f"{layer.name!r} and {layer.tied[0]!r}" for layer in planned if layer.tied]
    if tied:
        raise SettingError(
            f"{first_few(tied, ', ')}: share a weight, which Neural Compressor would untie. Use apply(), or skip them"
        )
    clipped = [repr(layer.name) for layer in planned if cast(Affine, layer.scheme).range != "minmax"]
    if clipped:
        raise SettingError(
            f"{first_few(clipped, ', ')}: clipped, and RTN takes the extremes; measure with range='minmax', or apply()"
        )
    halves = [repr(layer.name) for layer in planned if cast(Affine, layer.scheme).scale_dtype != "float32"]
    if halves:
        raise SettingError(
            f"{first_few(halves, ', ')}: scales in 16 bits, and RTN's are float32; measure with scale_dtype='float32', "
            "or use apply()"
        )
    wrapped = [repr(layer.name) for layer in planned if layer.bits == 8 and not cast(Affine, layer.scheme).symmetric]
    if wrapped:
        raise SettingError(
            f"{first_few(wrapped, ', ')}: asymmetric 8-bit codes overflow in Neural Compressor's arithmetic, and give "
            "other weights: measure with symmetric=True, take at most 7 bits, or use apply()"
        )
    if model is not None:
        check_model(plan, model)
    # Left to itself, RTN looks for a checkpoint to work from, and leaves lm_head and its like in float; told not to,
    # it fails on models that tie nothing but have a config that says so.
    heads = [layer.name for layer in planned if any(re.match(pattern, layer.name) for pattern in LM_HEAD_NAMES)]
    common = {"use_layer_wise": False, "quant_lm_head": bool(heads)}
    config = ExactRTNConfig(**common, white_list=None)
    for layer in planned:
        scheme = cast(Affine, layer.scheme)
        group_size = -1 if scheme.group_size is None else scheme.group_size
        layer_config = ExactRTNConfig(bits=layer.bits, use_sym=scheme.symmetric, group_size=group_size, **common)
        config.set_local(f"^{re.escape(layer.name)}$", layer_config)
    return config


class Exact:
    """What `to_inc` adds to a configuration of the compressor's: every name must be found in the model."""

    def get_model_info(self, model: nn.Module) -> list[tuple[str, str]]:
        """Name and type of every linear layer.

        Raises SettingError, MismatchError and WeightError for what RTN would spoil.
        """
        check_float(model)
        layers = super().get_model_info(model)  # type: ignore[misc]
        packed = [name for name, _ in layers if any(re.match(key, name) for key in self._patterns())]
        lent = lent_weights(Traced(model))
        for name in packed:
            layer = model.get_submodule(name)
            weight, reason = cast(Tensor, layer.weight), why_not_plain(layer)
            if reason or weight_name(name) in lent:
                reason = reason or "lends its weight to a functional call"
                raise MismatchError(
                    f"{name!r} {reason}, and Neural Compressor's packed layer would not: skip it, or use apply()"
                )
            if weight.dtype not in DTYPES:
                raise SettingError(f"{name!r}: is {weight.dtype}, and RTN packs float32 and float16; convert it first")
            check_weight(weight, name)
        return cast("list[tuple[str, str]]", layers)

    def _patterns(self) -> list[str]:
        """Of the plan's names; RTN adds its own, of heads to keep in float."""
        keys = self.local_config  # type: ignore[attr-defined]
        return [key for key in keys if isinstance(key, str) and key not in LM_HEAD_NAMES]

    def to_config_mapping(
        self, config_list: Any = None, model_info: Sequence[tuple[str, str]] | None = None
    ) -> "OrderedDict[tuple[str, str], Any]":
        """The mapping, longest names first. Raises MismatchError for names that the model lacks."""
        # RTN looks for transformers as it is imported, and fails where that came later.
        if "transformers" in sys.modules and not hasattr(rtn, "transformers"):
            cast(Any, rtn).transformers = sys.modules["transformers"]
        mapping = super().to_config_mapping(config_list, model_info)  # type: ignore[misc]
        lost = [repr(key) for key in self._patterns() if not any(re.match(key, name) for name, _ in mapping)]
        if lost:
            raise MismatchError(
                f"{first_few(lost, ', ')}: match no linear layer of the model; the plan was made for another one"
            )
        others = [repr(name) for name, kind in mapping if kind == READ_BY_OTHERS]
        if others:
            raise SettingError(
                f"{first_few(others, ', ')}: MultiheadAttention reads the weight itself, and fails on a packed one: "
                "skip it, or use apply()"
            )
        # Its load takes for fc1 the last entry whose name contains fc1, so fc10's must come before.
        return OrderedDict(sorted(mapping.items(), key=lambda item: -len(item[0][0])))


class ExactRTNConfig(Exact, RTNConfig):  # type: ignore[misc]
    """RTNConfig that finds all its layers, and whose saved models load."""
