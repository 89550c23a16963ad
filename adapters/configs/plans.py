"""What the writers of configurations share: a plan that a configuration can say, by the checkpoint's names."""

from pathlib import Path

from mpq_plugins.plans.arguments import check_plan
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.legalise import require_legal
from mpq_plugins.plans.names import layer_name
from mpq_plugins.plans.plan import Plan

from ..shared.float_checkpoint import left_in_float, open_float, require_plain
from ..shared.folded import refuse_entropy_coded


def named_layers(plan: Plan, source: Path, able: Capabilities) -> dict[str, LayerChoice | None]:
    """Every matrix of the checkpoint but embeddings in float, by its module's name; None for what stays in float.

    Quantizers look names up and say nothing of one that they do not find. Raises SettingError, MismatchError and
    SourceError as a ConfigWriter does.
    """
    check_plan(plan)
    refuse_entropy_coded(plan, able.backend, "CAPABILITIES")
    require_legal(plan, able)
    opened = open_float(plan, source)
    require_plain(opened, able.backend)
    coded = {layer_name(parameter): choice for parameter, choice in opened.coded_weights}
    return {**coded, **dict.fromkeys(left_in_float(opened))}
