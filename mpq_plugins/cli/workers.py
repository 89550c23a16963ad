"""Who measures or evaluates: threads of this process, or the workers of a dask cluster."""

import asyncio
import logging
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import click

from ..common.extras import how_to_install
from ..common.text import what_it_said
from ..common.workers import THREADS
from ..errors import SettingError, WorkerError
from .help import SectionOption
from .scheme_options import Command

CONNECT = 10  # seconds for a scheduler to answer
FIRST_WORKER = 60  # seconds for a cluster that is just starting


def worker_options(doing: str, default: str, section: str = "Where it runs") -> Callable[[Command], Command]:
    """Give a command --workers and --dask. doing: what with, as `measure`; default: how many threads there are."""

    def with_options(command: Command) -> Command:
        dask = click.option(
            "--dask", metavar="ADDRESS", cls=SectionOption, section=section,
            help=f"{doing.capitalize()} on the workers of a dask cluster: tcp://HOST:8786.",
        )  # fmt: skip
        workers = click.option(
            "--workers", type=click.IntRange(1, 1024), cls=SectionOption, section=section,
            help=f"Threads to {doing} with (default: {default}).",
        )  # fmt: skip
        return workers(dask(command))

    return with_options


@contextmanager
def chosen_executor(workers: int | None, address: str | None) -> Iterator[Executor | None]:
    """The executor that --workers or --dask asks for; None for neither. Raises SettingError or WorkerError."""
    if workers is not None and address is not None:
        raise click.UsageError("--workers are threads of this process, --dask is a cluster with its own; give one")
    if address is not None:
        with _dask(address) as executor:
            yield executor
        return
    if workers is None:
        yield None
        return
    with ThreadPoolExecutor(workers, THREADS) as pool:
        yield pool


@contextmanager
def _dask(address: str) -> Iterator[Executor]:
    try:
        from distributed import Client
    except ImportError as error:
        raise SettingError(f"dask: is not installed: {how_to_install('dask')}") from error
    warnings.filterwarnings("ignore", "Sending large graph")  # a model travels with each unit that needs it
    for name in [*logging.root.manager.loggerDict, "tornado.application"]:
        if name.startswith(("distributed", "tornado")):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what they say of a lost scheduler, our error says
    try:
        asyncio.run(_greeted(address))
        client = Client(address, timeout=CONNECT, set_as_default=False)  # type: ignore[no-untyped-call]
    except Exception as error:  # what answers may be anything, and so is what dask makes of it
        raise WorkerError(
            f"dask: no scheduler answers at {address!r} ({what_it_said(error)}). Start one with `dask scheduler`, and "
            "workers with `dask worker ADDRESS` where the files are under the same paths"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=FIRST_WORKER)
        except OSError as error:
            raise WorkerError(
                f"dask: the scheduler at {address!r} has no workers; start some with `dask worker {address}`"
            ) from error
        yield client.get_executor()  # type: ignore[no-untyped-call]


async def _greeted(address: str) -> None:
    """Whether dask answers there at all: its client would wait without end for one that is silent. Raises anything."""
    from distributed.comm.addressing import parse_address, parse_host_port
    from distributed.comm.core import connect

    parse_host_port(parse_address(address)[1])  # or a client half made would complain of itself
    async with asyncio.timeout(CONNECT + 1):  # `connect` itself only counts until somebody takes the call
        greeting = await connect(address, timeout=CONNECT)  # type: ignore[no-untyped-call]
    greeting.abort()
