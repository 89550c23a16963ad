"""Whether a file that a command is to write was written by `mpq` before, and may be replaced."""

from pathlib import Path

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


def check_replaceable(output: Path) -> None:
    """Refuse to write over a file that cannot be told to be `mpq`'s own. Raises SettingError.

    Plans, tables, containers, rows as CSV, pages and pictures are known by what they hold. A checkpoint looks alike
    whoever wrote it, so it is refused.
    """
    if not exists(output) or not output.is_file() or output.stat().st_size == 0 or is_ours(output):
        return
    raise SettingError(
        f"output: {output} exists, and it is not known to be a file of mpq's; --force writes over it, or name another"
    )


def is_ours(path: Path) -> bool:
    """Whether a file holds what only `mpq` writes."""
    with path.open("rb") as file:
        head = file.read(HEAD)
        if path.suffix.lower() in PICTURES:
            whole = head + file.read(MOST)
            return any(mark in whole for mark in MARKS)
    if head.startswith((PLAN, PAGE, *ROWS)):
        return True
    from ..checkpoints.checkpoint import CONTAINER_MAGIC  # with torch, which takes seconds
    from ..plans.table_file import is_table

    return head.startswith(CONTAINER_MAGIC) or is_table(path)
