"""How every file of ours notices damage: a CRC-32, which finds all damage to four bytes in a row and, of any other, all
but one in 2^32.

Blocks of bytes have theirs beside them. A JSON document has it in a field, over what the document says and not over how
it is laid out, so that it can be indented anew.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

FIELD = "checksum"


def checksum(data: "bytes | bytearray | memoryview", before: int = 0) -> int:
    """Of a block, or of what goes on after a block whose checksum was `before`."""
    return zlib.crc32(data, before)


def checksum_text(data: "bytes | bytearray | memoryview") -> str:
    """Of a block, in eight hexadecimal digits."""
    return f"{checksum(data):08x}"


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with its checksum, last."""
    plain = unsealed(document)
    return {**plain, FIELD: _of(plain)}


def unsealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document without its checksum."""
    return {name: value for name, value in document.items() if name != FIELD}


def is_damaged(document: Mapping[str, Any]) -> bool:
    """Whether the document has a checksum, and that of another."""
    return FIELD in document and document[FIELD] != _of(unsealed(document))


def _of(document: Mapping[str, Any]) -> str:
    return checksum_text(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
