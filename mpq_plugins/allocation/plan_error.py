"""The measured error of a whole plan, from the table it was made of."""

import numpy as np

from ..errors import SettingError
from ..plans.layers import LayerChoice
from ..plans.plan import Plan
from ..plans.scheme import FLOAT_BITS
from ..plans.stats import LayerStats
from ..plans.table import LayerTable

METRICS = ("relative", "mse")  # means over weights, so those of layers and channels add up


def plan_error(table: LayerTable, plan: Plan, metric: str = "relative") -> float | None:
    """Mean over all planned weights of the relative or squared error under the plan; None where the table cannot tell.

    The errors are those of float32 values; a half-precision weight is rounded once more, to its own dtype, which
    adds to them at 8 bits and little below.

    It cannot where the plan's scheme is not the one measured; and for parts, without errors per channel, or under
    per_tensor, where a part has a scale of its own. Raises SettingError for a metric or bit-width not measured,
    or a plan of other layers.
    """
    if metric not in METRICS:
        raise SettingError(f"metric: {metric!r} is not allowed; {', '.join(METRICS)}")
    layers = {layer.name: layer for layer in table.layers}
    if plan.by_name.keys() != layers.keys():
        raise SettingError("plan: has other layers than the table; measure the model that the plan is for")
    sums = [_error_sum(table, layers[choice.name], choice, metric) for choice in plan.layers]
    known = [total for total in sums if total is not None]
    return sum(known) / max(1, sum(layer.numel for layer in plan.layers)) if len(known) == len(sums) else None


def _error_sum(table: LayerTable, layer: LayerStats, choice: LayerChoice, metric: str) -> float | None:
    if choice.bits is not None and choice.bits in FLOAT_BITS:
        return 0.0
    if choice.scheme != table.scheme:
        return None
    if choice.bits is not None:
        return table.error(layer, metric, choice.bits) * layer.numel
    if metric not in layer.channel_errors or choice.scheme.granularity == "per_tensor":
        return None
    by_channel = sum(
        float(np.sum(table.channel_error(layer, metric, part.bits)[part.runs.array()]))
        for part in choice.all_parts
        if part.bits not in FLOAT_BITS
    )
    return by_channel * layer.numel / max(1, layer.channels)
