"""The schemes of this package by name, which files may have without anything being looked up; see scheme_names.py."""

from .entropy_coded import EntropyCoded
from .ggml import GGML
from .minifloat import Minifloat
from .scheme import Affine, Codebook, Piecewise

SCHEMES: dict[str, type[Affine | Piecewise | Codebook | EntropyCoded | GGML | Minifloat]] = {
    "affine": Affine, "piecewise": Piecewise, "codebook": Codebook, "entropy_coded": EntropyCoded,
    "ggml": GGML, "minifloat": Minifloat,
}  # fmt: skip
