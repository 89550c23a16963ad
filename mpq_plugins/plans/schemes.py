"""The schemes of this package by name, which files may have without anything being looked up; see scheme_names.py."""

from .affine import Affine
from .codebook import Codebook
from .entropy_coded import EntropyCoded
from .ggml import GGML
from .minifloat import Minifloat
from .piecewise import Piecewise

SCHEMES: dict[str, type[Affine | Piecewise | Codebook | EntropyCoded | GGML | Minifloat]] = {
    "affine": Affine, "piecewise": Piecewise, "codebook": Codebook, "entropy_coded": EntropyCoded,
    "ggml": GGML, "minifloat": Minifloat,
}  # fmt: skip
