import asyncio
import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pebble import ProcessExpired

import turnwise
from turnwise.environments.equivalence import compare, prepare_worker
from turnwise.environments.killable_pool import KillablePool

SOURCE = str(Path(turnwise.__file__).parents[1])


@pytest.fixture
def pool() -> Iterator[KillablePool]:
    pool = KillablePool(gc.enable, workers=2, seconds=600)
    yield pool
    pool.close()


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """A call of `Path.read_bytes` on it takes as long as the test has it open; who opens it waits for the call."""
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def workers() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid}


def run(script: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=600, env=environment, check=False
    )


def test_a_result_and_an_exception_come_back(pool: KillablePool) -> None:
    async def play() -> None:
        assert await pool.call(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await pool.call(divmod, 7, 0)

    asyncio.run(play())


def test_the_pool_serves_one_event_loop_after_another(pool: KillablePool) -> None:
    assert asyncio.run(pool.call(abs, -3)) == 3
    assert asyncio.run(pool.call(abs, -4)) == 4


def test_others_go_on_while_a_call_takes_long(pool: KillablePool, fifo: Path) -> None:
    async def play() -> None:
        slow = asyncio.create_task(pool.call(Path.read_bytes, fifo))
        with await asyncio.to_thread(fifo.open, "wb"):
            for number in range(100):
                assert await pool.call(abs, -number) == number
            assert not slow.done()
        assert await slow == b""

    asyncio.run(play())


@pytest.mark.parametrize(
    ("function", "arguments", "seconds"),
    [(exec, ("while True: pass",), 0.5), (pow, (3, 10**9), 0.5), (time.sleep, (600,), 0.05)],
    ids=["Python", "C", "waiting"],
)
def test_a_call_that_takes_too_long_is_killed(
    function: Callable[..., object], arguments: tuple[object, ...], seconds: float
) -> None:
    pool = KillablePool(gc.enable, workers=1, seconds=seconds)

    async def play() -> None:
        with pytest.raises(TimeoutError, match=f"killed after {seconds} seconds"):
            await pool.call(function, *arguments)
        pool._seconds = 600
        assert await pool.call(abs, -3) == 3

    asyncio.run(play())
    pool.close()


def test_a_worker_that_dies_says_so(pool: KillablePool) -> None:
    async def play() -> None:
        with pytest.raises(ProcessExpired):
            await pool.call(os._exit, 9)
        assert await pool.call(abs, -3) == 3

    asyncio.run(play())


@pytest.mark.parametrize("beside_another", [False, True])
def test_a_death_that_is_seen_before_the_call_was_heard_of(
    pool: KillablePool, fifo: Path, monkeypatch: pytest.MonkeyPatch, beside_another: bool
) -> None:
    def begun_with_late_news() -> None:
        assert pool._pool
        workers, reads, died = pool._pool._pool_manager.worker_manager, threading.Event(), threading.Event()
        receive, create = workers.receive, workers.create_workers

        def after_a_death(timeout: float) -> object:
            reads.set()
            died.wait(600)
            return receive(timeout)

        def created() -> None:
            if len(workers.workers) < 2:
                died.set()
            create()

        monkeypatch.setattr(workers, "receive", after_a_death)
        monkeypatch.setattr(workers, "create_workers", created)
        reads.wait(600)

    async def play() -> None:
        await pool.call(abs, 1)
        held = asyncio.create_task(pool.call(Path.read_bytes, fifo)) if beside_another else None
        with await asyncio.to_thread(fifo.open, "wb") if held else contextlib.nullcontext():
            assert await pool.call(abs, -2) == 2
            begun_with_late_news()
            with pytest.raises(ProcessExpired):
                await asyncio.wait_for(pool.call(os._exit, 9), 600)
        assert held is None or await held == b""

    asyncio.run(play())


def test_workers_that_die_idle_are_replaced(pool: KillablePool) -> None:
    async def play() -> None:
        before = workers()
        await pool.call(abs, 1)
        dead = workers() - before
        assert len(dead) == 2
        for pid in dead:
            os.kill(pid, signal.SIGKILL)
        assert await pool.call(abs, -3) == 3
        assert not workers() & dead

    asyncio.run(play())


def test_cancelling_callers_kills_no_worker_and_delays_nobody(fifo: Path) -> None:
    pool = KillablePool(gc.enable, workers=1, seconds=600)

    async def play() -> None:
        tasks = [asyncio.create_task(pool.call(Path.read_bytes, fifo))]
        with await asyncio.to_thread(fifo.open, "wb"):
            before = workers()
            tasks += [asyncio.create_task(pool.call(abs, number)) for number in range(50)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(result) for result in results} == {asyncio.CancelledError}
        assert await pool.call(abs, -3) == 3
        assert workers() == before

    asyncio.run(play())
    pool.close()


def test_closing_ends_the_workers_and_wakes_who_still_waits(fifo: Path) -> None:
    async def play() -> None:
        pool = KillablePool(gc.enable, workers=1, seconds=600)
        before = workers()
        waiting = asyncio.create_task(pool.call(Path.read_bytes, fifo))
        with await asyncio.to_thread(fifo.open, "wb"):
            assert len(workers() - before) == 1
            pool.close()
            assert workers() == before
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert await pool.call(abs, -2) == 2
        pool.close()

    asyncio.run(play())


SCRIPT = """
import asyncio, gc, multiprocessing
print("main is run", flush=True)
from turnwise.environments.killable_pool import KillablePool

pool = KillablePool(gc.enable, workers=2, seconds=600)
print(asyncio.run(pool.call(divmod, 7, 2)), flush=True)
"""


def test_a_script_needs_neither_a_main_guard_nor_close(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "main is run\n(3, 1)\n", "")


def test_other_processes_of_the_program_still_import_its_main_module(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "import turnwise.environments.killable_pool\n"
        "def double(number): return 2 * number\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool: print(pool.map(double, [4]))\n"
    )
    assert run(script).stdout == "[8]\n"


def test_a_busy_worker_does_not_outlive_a_killed_parent(tmp_path: Path, fifo: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT
        + "print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        + "pool._seconds = 2\n"  # of computing; it may wait for the parent's death for 20
        + f"asyncio.run(pool.call(exec, \"open('{fifo}').read(); pow(3, 10**9)\"))\n"
    )
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pids = [parent.stdout.readline() for _ in range(3)][2].split()
        assert len(pids) == 2
        with fifo.open("wb"):
            parent.kill()
    deadline = time.monotonic() + 300
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_workers_compare() -> None:
    pool = KillablePool(prepare_worker, workers=1, seconds=600)
    assert asyncio.run(pool.call(compare, "0.5", r"\frac{1}{2}")) == "right"
    pool.close()
