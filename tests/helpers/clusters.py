"""A dask cluster on this machine, for tests of work that is shared out."""

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def local_cluster(*, threads: int) -> Iterator[Any]:
    """Two dask workers, each a process that a nanny starts again when it is killed. threads: of each."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=threads, processes=True, dashboard_address=":0", silence_logs=50
    ) as made:
        yield made


@contextmanager
def executor_of(cluster: Any) -> Iterator[Executor]:
    """The cluster as an executor."""
    from distributed import Client

    with Client(cluster, set_as_default=False) as client:  # type: ignore[no-untyped-call]
        yield client.get_executor()
