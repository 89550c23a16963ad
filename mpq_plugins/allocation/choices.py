"""A measured layer at given widths: its entry in a plan."""

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import SettingError
from ..plans.channels import Channels
from ..plans.granular import FLOAT_BITS
from ..plans.group_sizes import fitted_to
from ..plans.layers import ALLOWED_BITS, LayerChoice, Part
from ..plans.scheme import Scheme
from ..plans.stats import LayerStats
from .contract import Widths

# Ten plans from one table should cost hardly more than one, so a layer's choices are made once, for as long as
# the table lives.
_CHOICES: WeakKeyDictionary[LayerStats, dict[tuple[int, Scheme], LayerChoice]] = WeakKeyDictionary()


def layer_choice(layer: LayerStats, bits: Widths, scheme: Scheme) -> LayerChoice:
    """A measured layer at these bits; channels of the same width become a part, parts ascend in width.

    scheme: the table's, of which the layer has what fits its shape.
    """
    if isinstance(bits, int):
        return _whole(layer, bits, scheme)
    widths = np.asarray(bits)
    if widths.shape != (layer.channels,):
        raise SettingError(f"layer {layer.name!r}: {widths.size} widths for {layer.channels} channels")
    distinct = np.unique(widths).tolist()
    if len(distinct) <= 1:  # a layer without channels has any width
        return _whole(layer, distinct[0] if distinct else 8, scheme)
    scheme = fitted_to(scheme, layer.shape, layer.channel_axis)
    parts = tuple(
        Part.model_construct(bits=_checked(layer, b, scheme, len(channels)), channels=Channels.of(channels))
        for b, channels in ((b, np.flatnonzero(widths == b)) for b in distinct)
    )
    return _construct(layer, scheme, parts=parts)


def _whole(layer: LayerStats, bits: int, scheme: Scheme) -> LayerChoice:
    made = _CHOICES.setdefault(layer, {})
    key = (bits, scheme)
    if key not in made:
        own = fitted_to(scheme, layer.shape, layer.channel_axis)
        made[key] = _construct(layer, own, bits=_checked(layer, bits, own, layer.channels))
    return made[key]


def _construct(layer: LayerStats, scheme: Scheme, **bits: Any) -> LayerChoice:
    return LayerChoice.model_construct(  # the rest is a measured layer's, valid already
        name=layer.name, kind=layer.kind, shape=layer.shape, channel_axis=layer.channel_axis,
        numel=layer.numel, scheme=scheme, tied=layer.tied, **bits,
    )  # fmt: skip


def _checked(layer: LayerStats, bits: int, scheme: Scheme, channels: int) -> int:
    if type(bits) is not int or bits not in ALLOWED_BITS:
        raise SettingError(f"layer {layer.name!r}: {bits!r} bits are not allowed; 1 to 8, or 16 or 32 for float")
    if bits not in FLOAT_BITS:
        scheme.check_bits(bits, f"layer {layer.name!r}: bits")
        scheme.check_part(bits, layer.shape, layer.channel_axis, channels, layer.name)
    return bits
