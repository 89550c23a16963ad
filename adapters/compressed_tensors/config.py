"""The quantization_config of a checkpoint: a group for each width and scheme, with exact names."""

from importlib.metadata import version
from typing import Any

from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.minifloat import NV_BLOCK
from mpq_plugins.plans.names import layer_name

from ..shared.float_checkpoint import FloatCheckpoint, left_in_float
from .nvfp4 import FORMAT, FP8, is_nvfp4
from .tensors import BYTES, PACKED, is_symmetric, stored_bits

MIXED = "mixed-precision"
NVFP4: dict[str, Any] = {
    "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": NV_BLOCK,
    "dynamic": False, "scale_dtype": str(FP8),
}  # fmt: skip


def quantization_config(source: FloatCheckpoint) -> dict[str, Any]:
    """What config.json says: which layers have which codes, and which stay in float.

    The package's version tells readers how codes of 3, 5, 6 and 7 bits are packed, which changed.
    """
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for parameter, choice in source.coded_weights:
        scheme = _scheme(choice)
        groups.setdefault(repr(scheme), (scheme, []))[1].append(layer_name(parameter))
    formats = sorted({scheme["format"] for scheme, _ in groups.values()})
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "version": version("compressed-tensors"),
        "config_groups": {
            f"group_{number}": {"targets": names, **scheme} for number, (scheme, names) in enumerate(groups.values())
        },
        "ignore": list(left_in_float(source)),
    }


def _scheme(choice: LayerChoice) -> dict[str, Any]:
    if is_nvfp4(choice):
        return {"format": FORMAT, "weights": NVFP4}
    size = choice.scheme.group_size
    weights = {
        "num_bits": stored_bits(choice),
        "type": "int",
        "symmetric": is_symmetric(choice),
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "dynamic": False,
    }
    return {"format": PACKED if is_symmetric(choice) else BYTES, "weights": weights}
