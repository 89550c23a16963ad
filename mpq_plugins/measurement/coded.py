"""What each layer's weights cost and lose at a ladder of steps, entropy coded, for plans of a file's size."""

import torch

from ..models.device import own_stream
from ..plans.entropy_coded import EntropyCoded
from ..plans.scheme import Scheme
from ..plans.stats import CodedCurve
from ..quantization.ladder import climbed
from ..weights.chunks import over_chunks
from ..weights.handles import Weight
from .error import Sums


def has_ladder(scheme: Scheme) -> bool:
    """Whether a table under the scheme has entropies: where steps are left to plans."""
    return isinstance(scheme, EntropyCoded) and scheme.step is None


def coded_sums(weight: Weight, scheme: EntropyCoded, device: torch.device | None) -> Sums:
    """One layer's curve as a unit of work gives it; reads the layer twice where it is large."""
    with own_stream(device):
        steps, bits, squared = climbed(over_chunks(weight, device), scheme)
    return {"steps": steps, "bits": bits, "squared_error": squared}


def coded_curve(sums: Sums) -> CodedCurve:
    """The curve of these sums."""
    return CodedCurve(sums["steps"], sums["bits"], sums["squared_error"])
