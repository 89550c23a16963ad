"""What a file that is no checkpoint of ours is: by how it begins, and by what a pickle in it names."""

import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from ..plans.table_file import is_table

LONGEST_START = 512
# How files of other kinds begin, what they are, and what to do.
STARTS: Sequence[tuple[bytes, str]] = (
    (b"GGUF", "a GGUF file, as llama.cpp has them; give it by itself"),
    (b"ggml", "a GGML file, as early llama.cpp had them; give the checkpoint it was made of"),
    (b"tjgg", "a GGJT file, as early llama.cpp had them; give the checkpoint it was made of"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras and h5py write them; save its weights as safetensors"),
    (b"\x93NUMPY", "a NumPy array; save the weights by name, as safetensors"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive; unpack it first"),
    (b"\xfd7zXZ\x00", "an xz archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer and not the file it stands for; fetch that with `git lfs pull`"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (bytes(64), "zeros where it should begin, as an interrupted download leaves a file; fetch it again"),
)
# How texts begin that were saved under a checkpoint's name.
WORDS: Sequence[tuple[str, str]] = (
    ("<?xml", "an XML document, perhaps an error of what it was fetched from; fetch the file again"),
    ("<", "a web page, perhaps an error of what it was fetched from; fetch the file again"),
    ("{", "a JSON document, which holds no weights; was it perhaps an error of what it was fetched from?"),
    (
        "",
        "a text and not a readable torch checkpoint or safetensors file; was it an error of what it was fetched from?",
    ),
)
TAR, TAR_AT = b"ustar", 257
TORCH_STARTS = (b"PK", b"\x80")  # a zip archive, or what torch wrote before it wrote those
TORCHS = re.compile(r"torch\.(\w+\.)*(_rebuild\w+|\w*Storage|Size|device|\w*(float|int|bool|complex)\w*)")
QUANTIZERS = (
    "torchao.", "bitsandbytes.", "optimum.quanto.", "quanto.", "hqq.", "gptqmodel.", "auto_gptq.", "awq.", "eetq.",
    "aqlm.", "compressed_tensors.", "torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.",
)  # fmt: skip
UNSAFE_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def other_kind(path: Path) -> str | None:
    """What the file is and what to do with it, in words; None for what may be a checkpoint of the kind it is called."""
    start = _start(path)
    if _is_safetensors(start):  # whose first bytes are a length, and could be anything
        if is_table(path):
            return "a table of mpq measure, which has no weights; give the model or the checkpoint that was measured"
        return None if path.suffix == ".safetensors" else _UNDER_ANOTHER_NAME
    for begins, what in STARTS:
        if start.startswith(begins):
            return what
    if start[TAR_AT:].startswith(TAR):
        return "a tar archive; unpack it first"
    text = _as_text(start)
    if text is not None:
        return next(what for begins, what in WORDS if text.startswith(begins))
    return _binary_kind(path, start)


def _binary_kind(path: Path, start: bytes) -> str | None:
    """As `other_kind`, of a file that begins with neither text nor what tells at once what it is."""
    if start[4:8] == b"TFL3":
        return "a TensorFlow Lite model; give the checkpoint it was made of"
    if start.startswith(b"PK"):
        return _archive_kind(path)
    if start[:1] == b"\x80" and path.suffix == ".safetensors":
        return "a pickle under another name, perhaps a torch checkpoint; rename it, so that it ends in .pt"
    if path.suffix in BY_SUFFIX:
        return BY_SUFFIX[path.suffix]
    if start and path.suffix != ".safetensors" and not start.startswith(TORCH_STARTS):
        return f"no torch checkpoint, for it begins with {start[:8]!r}; was it changed, or is it of another program?"
    return None


# What has no beginning of its own.
BY_SUFFIX = {
    ".onnx": "an ONNX model; give the torch model or checkpoint it was made of",
    ".msgpack": "a Flax checkpoint; load it with transformers (from_flax=True) and save its state_dict()",
    ".distcp": (
        "part of a distributed checkpoint; torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes a file of "
        "it"
    ),
}


def _as_text(start: bytes) -> str | None:
    """What a file begins with if that is text: printable, without its mark of byte order, blanks and comments."""
    try:
        text = start.decode("utf-8-sig")
    except UnicodeDecodeError as error:  # perhaps only of the last letter, which was cut
        if error.start < LONGEST_START - 3:
            return None
        text = start[: error.start].decode("utf-8-sig")
    if not text.strip() or not all(letter.isprintable() or letter.isspace() for letter in text):
        return None
    return text.strip().lower()


_DAMAGED = (
    OSError, ValueError, RuntimeError, LookupError, StopIteration, EOFError, zipfile.BadZipFile, zlib.error,
    struct.error,
)  # fmt: skip
_UNDER_ANOTHER_NAME = "a safetensors file under another name; rename it, so that it ends in .safetensors"


def pickled_objects(path: Path, said: str) -> list[str]:
    """Names of what a pickle would build beside tensors; by torch's own message `said` where the file does not tell.

    Nothing is executed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            if archive.getinfo(name).file_size < 1 << 26:
                foreign = [named for named in _globals(archive.read(name)) if not _is_torchs(named)]
                if foreign:
                    return list(dict.fromkeys(foreign))
    except _DAMAGED:  # then what torch says is left
        pass
    return list(dict.fromkeys(UNSAFE_GLOBAL.findall(said)))


def damage(path: Path) -> str | None:
    """What is wrong with an empty file, or a zip archive that lacks its end, where the list of what is in it lies."""
    try:
        if not path.stat().st_size:
            return "it is empty; fetch or write it again"
        cut = _start(path).startswith(b"PK") and not zipfile.is_zipfile(path)
    except _DAMAGED:
        return None
    return "an archive without its end: it was cut short; fetch or write it again" if cut else None


def of_quantizers(objects: Sequence[str]) -> list[str]:
    """Those of a pickle's objects that are weights as other libraries quantized them."""
    return [name for name in objects if name.startswith(QUANTIZERS) and "optim" not in name.removeprefix("optimum.")]


def _globals(data: bytes) -> list[str]:
    """What a pickle names, as module.name."""
    objects, words = [], [""]
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            objects.append(str(argument).replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            objects.append(".".join(words[-2:]))
        elif isinstance(argument, str):
            words.append(argument)
    return objects


def _is_torchs(name: str) -> bool:
    """Whether the pickle of a plain state dict names it too."""
    return name == "collections.OrderedDict" or TORCHS.fullmatch(name) is not None


def _archive_kind(path: Path) -> str | None:
    """Of a zip archive: a torch checkpoint is one too."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except _DAMAGED:
        return None
    if any(name.endswith("constants.pkl") for name in names) and any("/code/" in name for name in names):
        return (
            "a TorchScript archive, code along with its weights; load it with torch.jit.load and save its state_dict()"
        )
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        return "an exported program of torch.export; load it with torch.export.load and save its state_dict"
    if "model.weights.h5" in names:
        return "a Keras model; save its weights as safetensors"
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays; save the weights by name, as safetensors"
    if not any(name.endswith("data.pkl") for name in names):
        return "a zip archive, and no torch checkpoint; unpack it first"
    if path.suffix == ".safetensors":
        return "a torch checkpoint under another name; rename it, so that it ends in .pt"
    return None


def _is_safetensors(start: bytes) -> bool:
    return len(start) > 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 27


def _start(path: Path) -> bytes:
    if not path.is_file():  # a pipe may never give anything
        return b""
    try:
        with path.open("rb") as file:
            return file.read(LONGEST_START)
    except OSError:
        return b""
