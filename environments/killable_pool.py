"""Calls in worker processes that are killed when they take too long, in C code as in Python."""

import asyncio
import contextlib
import signal
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import spawn
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import ParamSpec, TypeVar

from pebble import ProcessExpired, ProcessPool
from pebble.pool.process import PoolManager

P = ParamSpec("P")
T = TypeVar("T")

_ATTEMPTS = 3
_WAITING = 10  # a call may take so many times as long as it may compute

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


class _Manager(PoolManager):
    """Reads all that a worker has sent before it acts on its death; pebble itself does so in two threads that race.

    Where the death is seen first, pebble knows of no call that the worker had begun, and lets it wait for ever.
    """

    def __init__(self, pool: ProcessPool, context: SpawnContext) -> None:
        super().__init__(pool._context, context)
        self._died = deque[tuple[int, int]]()

    def handle_worker_expiration(self, expiration: tuple[int, int]) -> None:
        self._died.append(expiration)

    def process_next_message(self, timeout: float) -> None:
        for _ in range(len(self._died)):
            expiration = self._died.popleft()
            with contextlib.suppress(OSError):  # closed
                while self.worker_manager.pool_channel.poll(0):  # type: ignore[union-attr]
                    super().process_next_message(0)
            super().handle_worker_expiration(expiration)
        super().process_next_message(timeout)


class KillablePool:
    """`workers` processes, each killed when one call takes it longer than `seconds`, and replaced at once.

    The seconds are of the CPU time of the worker, so that a call ends alike however busy the machine is. A call that
    only waits is killed after ten times as long.

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
                if death.exitcode in (-signal.SIGPROF, -signal.SIGALRM):
                    raise TimeoutError(f"killed after {self._seconds:g} seconds") from death
                raise
            except BrokenProcessPool:
                self._discard(pool)
        raise RuntimeError(f"worker processes died {_ATTEMPTS} times before they took a call; see what they printed")

    def close(self) -> None:
        """End the workers; calls that still wait are cancelled. A later call starts new workers."""
        with self._lock:
            pool, self._pool = self._pool, None
        for future in tuple(self._pending):  # before they hear that their pool is broken, and try another
            future.cancel()
        if pool is not None:
            pool.stop()  # type: ignore[no-untyped-call]
            pool.join()

    def _running_pool(self) -> ProcessPool:
        with self._lock:
            if self._pool is None:
                context = _WorkerContext()
                self._pool = ProcessPool(
                    self._workers, initializer=_initialize, initargs=(self._prepare,), context=context
                )
                self._pool._pool_manager = _Manager(self._pool, context)
            return self._pool

    def _discard(self, pool: ProcessPool) -> None:
        # Pebble gives a pool up for good where a worker died idle, say for lack of memory.
        with self._lock:
            if self._pool is pool:
                self._pool = None
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()


def _initialize(prepare: Callable[[], None]) -> None:
    for ended in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(ended, signal.SIG_DFL)
    prepare()


def _limited(
    seconds: float, function: Callable[..., T], arguments: tuple[object, ...], keywords: dict[str, object]
) -> T:
    # The kernel ends the worker: at once, in C code as well, and even where the parent process is gone.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, _WAITING * seconds)
    try:
        return function(*arguments, **keywords)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
