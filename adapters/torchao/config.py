"""A plan as torchao's own configurations, for whoever quantizes by `quantize_`."""

from collections import OrderedDict

import torch
from torch import nn
from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

from mpq_plugins.errors import SettingError
from mpq_plugins.plans.arguments import check_plan
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.legalise import require_legal
from mpq_plugins.plans.names import weight_name
from mpq_plugins.plans.plan import Plan

from ..shared.folded import check_model, planned_layers, refuse_entropy_coded

CONFIG_CAPABILITIES = Capabilities(
    backend="torchao's IntxWeightOnlyConfig",
    bits=tuple(range(2, 9)),
    kinds=("linear", "embedding"),
    granularities=("per_channel", "per_group"),
    stochastic=False,
)


def to_config(plan: Plan, model: nn.Module | None = None) -> FqnToConfig:
    """Make the plan's widths, granularity and symmetry stock torchao's config, for `quantize_` and TorchAoConfig.

    torchao chooses scales its own way (symmetric 4 bits: max|w| / 7.5), so weights come close to the plan's and are not
    equal, and layers at 16 bits stay as they are; `apply` is exact. Linear and embedding layers, 2 to 8 bits, per
    channel or per group.

    Args:
        plan: The plan.
        model: The float model, by which names are checked: torchao ignores those that it does not find.

    Returns:
        The configuration.

    Raises:
        SettingError: The plan has anything else, or tied weights, which quantize_ would untie.
        MismatchError: The plan is another model's.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import torchao
        >>> net = torch.nn.Sequential(torch.nn.Linear(32, 32)).eval()
        >>> table = mpq.measure(net, mpq.Affine(granularity="per_channel"))
        >>> type(torchao.to_config(mpq.Uniform(bits=4)(table), net)).__name__
        'FqnToConfig'
    """
    check_plan(plan)
    if model is not None:
        check_model(plan, model)
    refuse_entropy_coded(plan, CONFIG_CAPABILITIES.backend, "CONFIG_CAPABILITIES")
    require_legal(plan, CONFIG_CAPABILITIES)
    configs: OrderedDict[str, IntxWeightOnlyConfig | None] = OrderedDict()
    for layer in planned_layers(plan):
        if layer.tied:
            raise SettingError(
                f"layer {layer.name!r}: shares its weight with {layer.tied[0]!r}, which quantize_ would untie. Use "
                "apply(), or skip it"
            )
        # The parameter's name and not the module's, which transformers would apply to the bias too.
        configs[weight_name(layer.name)] = _config(layer)
    return FqnToConfig(fqn_to_config=configs)


def _config(layer: LayerChoice) -> IntxWeightOnlyConfig:
    scheme = layer.scheme.as_affine
    assert scheme is not None
    assert layer.bits is not None
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{layer.bits}"),
        granularity=PerAxis(0) if scheme.group_size is None else PerGroup(scheme.group_size),
        mapping_type=MappingType.SYMMETRIC if scheme.symmetric else MappingType.ASYMMETRIC,
    )
