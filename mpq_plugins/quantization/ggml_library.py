"""ggml's own rounding, called in the library that the package xllamacpp brings; the package itself is not imported."""

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..common.extras import how_to_install
from ..errors import SettingError
from ..plans.ggml import NUMBERS, TYPES

PACKAGE = "xllamacpp"


@dataclass(frozen=True)
class Library:
    """ggml, loaded; `has` says which types it knows as we do."""

    loaded: ctypes.CDLL

    def has(self, kind: str) -> bool:
        """Whether it has the type, with the blocks that we expect: asked for another, ggml ends the process."""
        number, block = ctypes.c_int(NUMBERS[kind]), TYPES[kind]
        name = self.loaded.ggml_type_name(number)
        if name is None or name.decode(errors="replace").lower() != kind:
            return False
        sizes: tuple[int, int] = self.loaded.ggml_blck_size(number), self.loaded.ggml_type_size(number)
        return sizes == (block.weights, block.size)

    def quantize(
        self, rows: NDArray[np.float32], kind: str, importance: NDArray[np.float32] | None
    ) -> NDArray[np.uint8]:
        """Finite rows of whole blocks, contiguous -> bytes of their blocks, (rows, bytes).

        importance: of each column. Types that ggml cannot round without one get 1 for each.
        """
        number, block = NUMBERS[kind], TYPES[kind]
        if importance is None and self.loaded.ggml_quantize_requires_imatrix(number):
            importance = np.ones(rows.shape[1], np.float32)
        blocks = np.zeros((rows.shape[0], rows.shape[1] // block.weights * block.size), np.uint8)
        if blocks.size:
            matters = None if importance is None else importance.ctypes.data
            self.loaded.ggml_quantize_chunk(number, rows.ctypes.data, blocks.ctypes.data, 0, *rows.shape, matters)
        return blocks


@cache
def library() -> Library | None:
    """ggml; None where the package is not installed, or its file is not as we know it."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    for path in sorted(Path(found.origin).parent.glob("*.so")):
        try:
            return Library(_declared(ctypes.CDLL(str(path))))
        except (OSError, AttributeError):  # another system's, or a library without these functions
            continue
    return None


def required_library(kind: str) -> Library:
    """ggml, which has the type. Raises SettingError, saying what to install."""
    found = library()
    if found is None:
        raise SettingError(
            f"type: ggml's {kind} is rounded by {PACKAGE}, which is not installed: {how_to_install('gguf')}"
        )
    if not found.has(kind):
        raise SettingError(
            f"type: the installed {PACKAGE} has no {kind}, or another than we know; install the tested release: "
            f"{how_to_install('gguf')}"
        )
    return found


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of the functions that are called. Raises AttributeError where one is missing."""
    loaded.ggml_type_name.restype = ctypes.c_char_p
    loaded.ggml_blck_size.restype = ctypes.c_int64
    loaded.ggml_type_size.restype = ctypes.c_size_t
    loaded.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    loaded.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return loaded
