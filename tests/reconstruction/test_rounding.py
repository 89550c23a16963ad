import subprocess
import sys
from typing import get_args

import pytest

from mpq_plugins.errors import SettingError
from mpq_plugins.reconstruction.rounding import ROUNDINGS, Rounding, checked_rounding, rounding_label


@pytest.mark.parametrize(
    ("given", "calibrated", "meant"),
    [
        (None, False, "nearest"), (None, True, "compensated"), ("nearest", False, "nearest"),
        ("nearest", True, "nearest"), ("compensated", True, "compensated"), ("learned", True, "learned"),
    ],
)  # fmt: skip
def test_what_is_meant(given: str | None, calibrated: bool, meant: str) -> None:
    assert checked_rounding(given, calibrated=calibrated) == meant


@pytest.mark.parametrize("given", ["", "Nearest", "learnt", "round"])
def test_other_words_are_refused_with_all_there_are(given: str) -> None:
    with pytest.raises(SettingError, match="nearest, compensated, learned"):
        checked_rounding(given, calibrated=True)


def test_four_labels_tell_rows_apart() -> None:
    labels = [rounding_label("nearest", calibrated=False)]
    labels += [rounding_label(word, calibrated=True) for word in ROUNDINGS]
    assert labels == ["nearest", "nearest, corrected", "compensated", "learned"]


def test_the_words_are_known_without_torch() -> None:
    code = "import sys, mpq_plugins.reconstruction.rounding as r; sys.exit('torch' in sys.modules or not r.ROUNDINGS)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_type_lists_the_words() -> None:
    assert get_args(Rounding) == ROUNDINGS
