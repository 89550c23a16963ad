"""Units of work that run a model: here one after another, or on an executor's threads, processes or machines.

What all units need, such as the model, is pickled once and travels with each. A unit computes in the caller's modes,
wherever that is: with as many of torch's threads, for sums may be added in another order by another number of them, and
under the caller's autocast, gradients and default dtype, which are a thread's or a process's own.
"""

import pickle
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..common.text import what_it_said
from ..common.workers import IN_FLIGHT, Call, Workers, is_here
from ..errors import WorkerError
from .autocast import Autocast, autocast_now, under_autocast

LEAST, MOST = 32, 1 << 30  # units, and bytes, that are on their way at a time
OURS = ("builtins", "mpq_plugins")  # whose warnings a worker's unit hands back


@dataclass(frozen=True)
class Job:
    """What is done to each unit.

    function: of the needs, in their order, and of a unit's own arguments; it can be imported by name. needs: what every
    unit needs, by what errors call it. doing: what is done to a unit, as errors say it.
    """

    function: Callable[..., Any]
    needs: Mapping[str, Any]
    doing: str

    def results(self, units: Iterable["Unit"], executor: Executor | None) -> Iterator[tuple["Unit", Any]]:
        """Each unit with its result: in their order without an executor, and as they come from one.

        Raises what the function raises, SettingError for what is no executor, and WorkerError for one that is closed,
        for workers that are lost for good, and for what cannot be pickled.
        """
        if executor is None:
            for unit in units:
                yield unit, self.function(*self.needs.values(), *unit.arguments)
            return
        modes = Modes.now()
        alike = Alike(modes, *_arithmetic())
        Workers(executor, 1)  # which refuses what is none
        packed = None if is_here(executor) else {n: _packed(n, need, executor) for n, need in self.needs.items()}
        bytes_of_one = sum(map(len, packed.values())) if packed is not None else 0
        in_flight = min(IN_FLIGHT, max(LEAST, MOST // max(1, bytes_of_one)))
        by_name: dict[str, Unit] = {}

        def calls() -> Iterator[Call]:
            for unit in units:
                by_name[unit.name] = unit
                if packed is None:
                    yield Call(unit.name, here, (self, modes, unit.arguments), unit.label, self.doing)
                    continue
                own = _packed(f"arguments of {unit.label!r}", unit.arguments, executor)
                yield Call(unit.name, elsewhere, (self.function, alike, packed, own), unit.label, self.doing)

        with closing(Workers(executor, 1, in_flight=in_flight, apart=True)) as workers:
            for call, (result, said) in workers.finished(calls()):
                for warning in said:
                    warnings.warn(warning, stacklevel=3)
                yield by_name.pop(call.name), result


@dataclass(frozen=True)
class Unit:
    """One unit. name: its own in the job; label: what errors call it; arguments: beside what all units need."""

    name: str
    label: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Modes:
    """What torch computes differently by, that a thread or a process has of its own.

    autocast: by device, to which dtype, where it is on.
    """

    threads: int
    grad: bool
    inference: bool
    dtype: torch.dtype
    precision: str
    autocast: Autocast

    @classmethod
    def now(cls) -> "Modes":
        """This thread's."""
        return cls(
            torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.get_default_dtype(), torch.get_float32_matmul_precision(), autocast_now(),
        )  # fmt: skip

    @contextmanager
    def held(self) -> Iterator[None]:
        """In this thread; what is the whole process's stays so, for other units may run beside this one."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        if torch.get_default_dtype() != self.dtype:
            torch.set_default_dtype(self.dtype)
        if torch.get_float32_matmul_precision() != self.precision:
            torch.set_float32_matmul_precision(self.precision)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            stack.enter_context(under_autocast(self.autocast))
            yield


def here(job: Job, modes: Modes, arguments: tuple[Any, ...]) -> tuple[Any, list[Warning]]:
    """What a thread of this process does: the result, and no warnings, for these are heard already."""
    with modes.held():
        return job.function(*job.needs.values(), *arguments), []


@dataclass(frozen=True)
class Alike:
    """In what workers have to be like the caller: modes, which they take over, and the version of torch and the
    instructions that it uses, which they must have."""

    modes: Modes
    torch: str
    instructions: str


def _arithmetic() -> tuple[str, str]:
    return str(torch.__version__), str(torch.backends.cpu.get_cpu_capability())


def elsewhere(
    function: Callable[..., Any], alike: Alike, packed: Mapping[str, bytes], arguments: bytes
) -> tuple[Any, list[Warning]]:
    """What another process does: the result, and the warnings of ours that would be heard by nobody there."""
    if (alike.torch, alike.instructions) != _arithmetic():
        raise WorkerError(
            f"executor: a worker computes with torch {' on '.join(_arithmetic())}, and this process with {alike.torch} "
            f"on {alike.instructions}: the last bits would depend on who did what. Use workers with the same "
            "processors and packages"
        )
    needs = [_unpacked(name, data) for name, data in packed.items()]
    with _hearing() as said, alike.modes.held():
        return function(*needs, *_unpacked("unit's arguments", arguments)), said


def _packed(name: str, need: Any, executor: Executor) -> bytes:
    """Pickled, by cloudpickle where dask or another executor brings it, which takes what a process pool cannot."""
    try:
        return _dumps(executor)(need)
    except Exception as error:  # a user's object may hold anything
        raise WorkerError(
            f"executor: the {name} cannot be pickled to be sent to a process ({what_it_said(error)}). Define its "
            "functions and classes at the top of a module, without lambda, or use a ThreadPoolExecutor"
        ) from error


def _dumps(executor: Executor) -> Callable[[Any], bytes]:
    if isinstance(executor, ProcessPoolExecutor):
        return pickle.dumps
    try:
        import cloudpickle
    except ImportError:
        return pickle.dumps
    dumps: Callable[[Any], bytes] = cloudpickle.dumps
    return dumps


def _unpacked(name: str, data: bytes) -> Any:
    try:
        return pickle.loads(data)  # noqa: S301  # of the process that this one works for
    except Exception as error:  # a module's code may raise anything
        raise WorkerError(
            f"executor: a worker cannot load the {name} ({what_it_said(error)}); workers have to import the modules "
            "that its functions and classes are defined in, at the same version"
        ) from error


class _Said(threading.local):
    """What was warned of in the unit that this thread is at; None where it is at none."""

    warnings: list[Warning] | None = None


_SAID = _Said()


@contextmanager
def _hearing() -> Iterator[list[Warning]]:
    """Take down this thread's warnings; catch_warnings would take those of a dask worker's other threads."""
    _listen()
    said = _SAID.warnings = []
    try:
        yield said
    finally:
        _SAID.warnings = None


def _listen() -> None:
    shown = warnings.showwarning
    if getattr(shown, "hears_units", False):
        return

    def hear(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if _SAID.warnings is not None and category.__module__ in OURS:
            _SAID.warnings.append(category(str(message)))
        else:
            shown(message, category, *where, **more)

    hear.hears_units = True  # type: ignore[attr-defined]
    warnings.showwarning = hear
