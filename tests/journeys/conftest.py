"""What journeys share."""

from collections.abc import Callable
from types import ModuleType

import pytest
from torch import Tensor

FEW = 64


@pytest.fixture
def with_few_images(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """Have an example look at a few images of each set: what it prints is tried, its numbers are `make examples`'."""

    def shorten(example: ModuleType) -> None:
        images: Callable[..., tuple[Tensor, ...]] = example.images
        monkeypatch.setattr(example, "images", lambda *name: tuple(part[:FEW] for part in images(*name)))

    return shorten
