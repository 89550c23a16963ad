"""What types are called, by scheme and width: the names that `--types` and `--pin` take."""

from .affine import Affine
from .scheme import Scheme

GROUP_SIZES = (32, 64, 128)
TWICE = ("mxfp4", "nvfp4")  # ggml's types that others have too, and round otherwise


def type_name(scheme: Scheme, bits: int) -> str | None:
    """The name of the type that codes of this width under the scheme are; None where there is none."""
    own = getattr(scheme, "type", None)
    if isinstance(own, str):
        return f"ggml_{own}" if scheme.name == "ggml" and own in TWICE else own
    if not isinstance(scheme, Affine) or scheme.range != "minmax" or bits < 2:
        return None
    if (scheme.symmetric, scheme.scale_dtype) != ("full", "float16"):
        return None
    if scheme.granularity == "per_channel":
        return f"int{bits}"
    return f"int{bits}_g{scheme.group_size}" if scheme.group_size in GROUP_SIZES else None
