"""The batches that a backend calibrates by."""

from collections.abc import Iterable
from typing import Any

from mpq_plugins.errors import SettingError
from mpq_plugins.models.running import checked_batches


def needed_batches(batches: Iterable[Any], why: str) -> list[Any]:
    """All batches, at least one. why: what they are for, in a half-sentence. Raises SettingError."""
    if isinstance(batches, list | tuple) and not batches:
        raise SettingError(f"batches: none given, and {why}; give a list of the model's inputs")
    return checked_batches(batches)
