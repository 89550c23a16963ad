"""The scheme that a layer has itself, where its inputs do not divide into the groups that were asked for.

Targets fall back layer by layer, and so do we, by one rule, which is worked out from the layer's shape wherever it is
needed: nothing more is stored.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, cast

from .granular import inputs_of
from .scheme import Scheme

LEAST_GROUP = 16  # a 32-bit scale for fewer weights takes more than 2 bits of each


def fitted_to(scheme: Scheme, shape: Sequence[int], channel_axis: int) -> Scheme:
    """The scheme as a layer of this shape has it: itself, where the layer's inputs divide into its groups.

    Else its groups have the largest power of two that is smaller, divides the inputs and is no less than LEAST_GROUP,
    and where there is none, the output channel is the group. A scheme of another package whose granularity is no field
    stays as it is, and refuses the layer.
    """
    size = scheme.group_size
    if scheme.granularity != "per_group" or size is None or len(shape) <= channel_axis:
        return scheme
    inputs = inputs_of(shape, channel_axis)
    if inputs % size == 0 or not {"granularity", "group_size"} <= {field.name for field in fields(scheme)}:
        return scheme
    smaller = [1 << power for power in range(size.bit_length()) if LEAST_GROUP <= 1 << power < size]
    dividing = [candidate for candidate in smaller if inputs % candidate == 0]
    if dividing:
        own: dict[str, Any] = {"group_size": dividing[-1]}
    else:
        own = {"granularity": "per_channel", "group_size": None}
    return cast(Scheme, replace(cast(Any, scheme), **own))
