"""Calls in worker processes that are killed when they take too long, in C code as in Python."""

import asyncio
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import spawn
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import ParamSpec, TypeVar

from pebble import ProcessExpired, ProcessPool

P = ParamSpec("P")
T = TypeVar("T")

_ATTEMPTS = 3

# A spawned process imports the main module of its parent once more, which starts a script without a `__main__` guard
# all over again. Our workers need nothing from there, and the standard library has no switch for it: the one function
# that names the main module is wrapped, and acts differently only in a thread that is starting one of our workers.
_starting = threading.local()
_get_preparation_data = spawn.get_preparation_data


def _preparation_without_main(name: str) -> dict[str, object]:
    data = _get_preparation_data(name)
    if getattr(_starting, "worker", False):
        data = {key: value for key, value in data.items() if not key.startswith("init_main")}
    return data


spawn.get_preparation_data = _preparation_without_main


class _WorkerProcess(SpawnProcess):
    def start(self) -> None:
        _starting.worker = True
        try:
            super().start()
        finally:
            _starting.worker = False


class _WorkerContext(SpawnContext):
    Process = _WorkerProcess


class KillablePool:
    """`workers` processes, each killed when one call takes it longer than `seconds`, and replaced at once.

    The workers are spawned, not forked, so threads in this process (torch, asyncio) are safe. They start with the first
    call, each calls `prepare` once before its calls, and none imports the main module: a script needs no
    `if __name__ == "__main__"` guard. Functions that are called must therefore live in an importable module.

    A killed worker is missed for the time that its successor takes to import; the others go on meanwhile.
    """

    def __init__(self, prepare: Callable[[], None], *, workers: int, seconds: float) -> None:
        self._prepare = prepare
        self._workers = workers
        self._seconds = seconds
        self._pool: ProcessPool | None = None
        self._lock = threading.Lock()
        self._pending: set[Future[object]] = set()

    async def call(self, function: Callable[P, T], /, *arguments: P.args, **keywords: P.kwargs) -> T:
        """What `function` returns in a worker.

        Raises TimeoutError where the worker was killed for the time that it took, and pebble.ProcessExpired where it
        died in another way. The caller may be cancelled: the worker then finishes the call for nobody.
        """
        for _ in range(_ATTEMPTS):
            pool = self._running_pool()
            try:
                future = pool.schedule(_limited, args=(self._seconds, function, arguments, keywords))
            except RuntimeError:  # the pool broke before
                self._discard(pool)
                continue
            self._pending.add(future)
            future.add_done_callback(self._pending.discard)
            try:
                # Shielded, since pebble answers the cancellation of a running call by killing the worker.
                return await asyncio.shield(asyncio.wrap_future(future))
            except ProcessExpired as death:
                if death.exitcode == -signal.SIGALRM:
                    raise TimeoutError(f"killed after {self._seconds:g} seconds") from death
                raise
            except BrokenProcessPool:
                self._discard(pool)
        raise RuntimeError(f"worker processes died {_ATTEMPTS} times before they took a call; see what they printed")

    def close(self) -> None:
        """End the workers; calls that still wait are cancelled. A later call starts new workers."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()  # type: ignore[no-untyped-call]
            pool.join()
        for future in tuple(self._pending):
            future.cancel()

    def _running_pool(self) -> ProcessPool:
        with self._lock:
            if self._pool is None:
                self._pool = ProcessPool(
                    self._workers, initializer=_initialize, initargs=(self._prepare,), context=_WorkerContext()
                )
            return self._pool

    def _discard(self, pool: ProcessPool) -> None:
        # Pebble gives a pool up for good where a worker died idle, say for lack of memory.
        with self._lock:
            if self._pool is pool:
                self._pool = None
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()


def _initialize(prepare: Callable[[], None]) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    prepare()


def _limited(
    seconds: float, function: Callable[..., T], arguments: tuple[object, ...], keywords: dict[str, object]
) -> T:
    # The kernel ends the worker: at once, in C code as well, and even where the parent process is gone.
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return function(*arguments, **keywords)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
