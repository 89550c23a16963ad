"""What journeys share."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from examples import cifar_resnet

FEW = 64


@pytest.fixture(autouse=True)
def threads_are_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples want two threads; beside another worker these wait for each other, then and in all later tests."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture
def with_few_images(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """Have an example look at a few images of each set: what it prints is tried, its numbers are `make examples`'."""

    images = cifar_resnet.images

    def few(*name: str) -> tuple[Tensor, ...]:
        return tuple(part[:FEW] for part in images(*name))

    def shorten(example: ModuleType) -> None:
        for module in (example, cifar_resnet):  # whose `score` looks at its own
            monkeypatch.setattr(module, "images", few)

    return shorten
