"""The schemes of this package by name, which files may have without anything being looked up; see scheme_names.py."""

from .entropy_coded import EntropyCoded
from .ggml import GGML
from .scheme import Affine, Codebook, Piecewise

SCHEMES: dict[str, type[Affine | Piecewise | Codebook | EntropyCoded | GGML]] = {
    "affine": Affine, "piecewise": Piecewise, "codebook": Codebook, "entropy_coded": EntropyCoded, "ggml": GGML,
}  # fmt: skip
