"""A copy of a user's model, or an error that says why there can be none."""

import copy
from typing import TYPE_CHECKING

from .errors import SettingError, what_it_said

if TYPE_CHECKING:
    from torch import nn


def duplicate(model: "nn.Module") -> "nn.Module":
    """A deep copy. Raises SettingError for what torch cannot copy, such as outputs that a module keeps."""
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a user's module may hold anything
        raise SettingError(
            f"{type(model).__name__}: cannot be copied, and it is never changed itself ({what_it_said(error)}). Remove "
            "what it keeps of earlier runs, or parametrizations"
        ) from error
