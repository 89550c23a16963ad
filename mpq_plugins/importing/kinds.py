"""Which tool's file it is, by what it holds."""

from pathlib import Path
from typing import Any, Literal, get_args

from ..checkpoints.gguf_header import is_gguf
from ..errors import FormatError, SettingError
from .autoround import PATTERN, is_autoround
from .documents import document_of
from .modelopt import is_modelopt
from .olive import is_olive

Kind = Literal["imatrix", "autoround", "modelopt", "olive"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MLX = (
    "is mlx-lm's, one number a layer: the gain from a low to a high width that the file does not name. Plans need the "
    "cost at each width, which that does not tell; measure it: mpq measure MODULE:FACTORY --sensitivity output_mse"
)


def kind_of(path: Path) -> Kind:
    """What a file or directory is of. Raises FormatError for what is of none, SettingError for what cannot serve."""
    if path.is_dir():
        if any(path.glob(PATTERN)):
            return "autoround"
        raise FormatError(f"{path}: has no {PATTERN}, as AutoScheme leaves; give a file")
    start = _start(path)
    if start.startswith(b"GGUF") and is_gguf(path):
        return "imatrix"
    if start.startswith((b"PK", b"\x80")):
        return "modelopt"
    if _is_old_imatrix(start):
        return "imatrix"
    return _of_document(path, document_of(path))


def _of_document(path: Path, document: Any) -> Kind:
    if is_autoround(document):
        return "autoround"
    if is_modelopt(document):
        return "modelopt"
    if is_olive(document):
        return "olive"
    if _is_mlx(document):
        raise SettingError(f"{path}: {MLX}")
    raise FormatError(f"{path}: none of what is read: {', '.join(KINDS)}; --format says which it should be")


def _is_mlx(document: Any) -> bool:
    return (
        isinstance(document, list)
        and bool(document)
        and all(isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) for entry in document)
    )


def _is_old_imatrix(start: bytes) -> bool:
    """How many entries, then the length of a name, and the name, as llama-imatrix wrote them until 2025."""
    entries, length = (int.from_bytes(start[at : at + 4], "little") for at in (0, 4))
    name = start[8 : 8 + length]
    return 0 < entries < 1 << 20 and 0 < length < 128 and len(name) == length and name.isascii() and b"." in name


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(256)
    except OSError as error:
        raise FormatError(f"{path}: cannot read it ({error.strerror or error})") from error
