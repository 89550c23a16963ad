"""Whether a file that a command is to write was written by `mpq` before, and may be replaced."""

from pathlib import Path
from typing import Literal

from ..common.files import exists
from ..errors import SettingError

HEAD = 4096  # bytes that tell most kinds
MOST = 64 << 20  # of a picture, whose mark may be at its end
PICTURES = (".png", ".svg", ".pdf")
MARKS = (b"Software\0mpq-plugins", b"<dc:title>mpq-plugins</dc:title>", b"/Creator (mpq-plugins)")  # of pictures
ROWS = (  # what rows as CSV begin with
    b"series,allocator,average_bits,total_average_bits,weights_only_bytes,total_bytes,",
    b"allocator,average_bits,total_average_bits,weights_only_bytes,total_bytes,",
    b"plan,rounding,corrected,total_bytes,total_average_bits,",
    b"plan,corrected,total_bytes,total_average_bits,",  # before there was a choice of rounding
)
PAGE = (
    b'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="mpq-plugins">'
)
PLAN = b'{\n  "format": "mpq-plan",\n  "version": '


Kind = Literal["a plan", "a table", "a container", "a page", "rows as CSV", "a picture", "a checkpoint"]
"""What commands write. A checkpoint looks alike whoever wrote it, so a file is never known to be one of ours."""


def check_replaceable(output: Path, writes: Kind) -> None:
    """Refuse to write over a file that is not known to be one of `mpq`'s, or is of another kind. Raises SettingError.

    writes: what is to be written; kinds are known by what files hold.
    """
    if not exists(output) or not output.is_file() or output.stat().st_size == 0:
        return
    found = kind_of(output)
    if found == writes:
        return
    what = f"and it is {found}, where this writes {writes}"
    if found is None:
        what = "and it is not known to be a file of mpq's"
    raise SettingError(f"output: {output} exists, {what}; --force writes over it, or name another")


def kind_of(path: Path) -> Kind | None:
    """What a file is of that which only `mpq` writes; None for anything else."""
    with path.open("rb") as file:
        head = file.read(HEAD)
        if path.suffix.lower() in PICTURES:
            whole = head + file.read(MOST)
            return "a picture" if any(mark in whole for mark in MARKS) else None
    starts: dict[Kind, bytes | tuple[bytes, ...]] = {"a plan": PLAN, "a page": PAGE, "rows as CSV": ROWS}
    for kind, start in starts.items():
        if head.startswith(start):
            return kind
    from ..checkpoints.checkpoint import CONTAINER_MAGIC  # with torch, which takes seconds
    from ..plans.table_file import is_table

    if head.startswith(CONTAINER_MAGIC):
        return "a container"
    return "a table" if is_table(path) else None
