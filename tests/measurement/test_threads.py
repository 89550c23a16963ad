"""Sensitivities that draw at random: the same numbers whatever other threads do, and no other thread's are touched."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from mpq_plugins import LayerTable, measure, sensitivity
from tests.helpers.nets import conv_net

BATCHES = [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]


def found(model: nn.Module, table: LayerTable, kind: str, seed: int) -> list[np.ndarray]:
    made = sensitivity(model, table, kind, BATCHES, seed=seed)
    return [layer.sensitivities[kind] for layer in made.layers]


@contextmanager
def somebody_drawing() -> Iterator[None]:
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.rand(100)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fisher", "hessian"])
def test_other_threads_change_nothing(kind: str) -> None:
    model = conv_net().eval()
    table = measure(model)
    jobs = [0, 1, 0, 1]
    alone = [found(model, table, kind, seed) for seed in jobs]
    assert not np.array_equal(alone[0], alone[1])  # the seed is what decides
    with somebody_drawing(), ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: found(model, table, kind, seed), jobs))
    for ours, theirs in zip(alone, together, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_process_keeps_its_own_numbers_and_settings() -> None:
    model = conv_net().eval()
    table = measure(model)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda seed: found(model, table, "fisher", seed), range(6)))
    assert torch.rand(3).equal(expected)
    assert torch.backends.mha.get_fastpath_enabled()
