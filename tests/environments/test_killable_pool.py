import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pebble import ProcessExpired

import turnwise
from turnwise.environments.equivalence import compare, prepare_worker
from turnwise.environments.killable_pool import KillablePool

SOURCE = str(Path(turnwise.__file__).parents[1])


@pytest.fixture
def pool() -> Iterator[KillablePool]:
    pool = KillablePool(prepare_worker, workers=2, seconds=1)
    yield pool
    pool.close()


def workers() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid}


def run(script: Path, *, seconds: float = 30) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=seconds, env=environment, check=False
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


def test_a_call_that_takes_too_long_is_killed_and_the_others_go_on(pool: KillablePool) -> None:
    async def play() -> None:
        await pool.call(abs, 1)
        start = time.perf_counter()
        slow = asyncio.create_task(pool.call(time.sleep, 60))
        others = 0
        while not slow.done():
            assert await pool.call(abs, -others) == others
            others += 1
        with pytest.raises(TimeoutError, match="killed after 1 seconds"):
            await slow
        assert time.perf_counter() - start < 3
        assert others > 100

    asyncio.run(play())


def test_c_code_is_killed_too(pool: KillablePool) -> None:
    async def play() -> None:
        with pytest.raises(TimeoutError):
            await pool.call(pow, 3, 10**9)
        assert await pool.call(abs, -3) == 3

    asyncio.run(play())


def test_a_worker_that_dies_says_so(pool: KillablePool) -> None:
    async def play() -> None:
        with pytest.raises(ProcessExpired):
            await asyncio.gather(pool.call(os._exit, 9), pool.call(time.sleep, 0.5))
        assert await pool.call(abs, -3) == 3

    asyncio.run(play())


def test_workers_that_die_idle_are_replaced(pool: KillablePool) -> None:
    async def play() -> None:
        before = workers()
        await asyncio.gather(pool.call(time.sleep, 0.3), pool.call(time.sleep, 0.3))
        assert len(workers() - before) == 2
        for pid in workers() - before:
            os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.5)
        assert await pool.call(abs, -3) == 3

    asyncio.run(play())


def test_cancelling_callers_kills_no_worker_and_delays_nobody(pool: KillablePool) -> None:
    async def play() -> None:
        await asyncio.gather(pool.call(time.sleep, 0.3), pool.call(time.sleep, 0.3))
        before = workers()
        tasks = [asyncio.create_task(pool.call(time.sleep, 0.02)) for _ in range(50)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(result, asyncio.CancelledError) for result in results) > 30
        start = time.perf_counter()
        assert await pool.call(abs, -3) == 3
        assert time.perf_counter() - start < 2
        assert workers() == before

    asyncio.run(play())


def test_closing_ends_the_workers_and_wakes_who_still_waits() -> None:
    async def play() -> None:
        pool = KillablePool(prepare_worker, workers=1, seconds=30)
        before = workers()
        await pool.call(abs, 1)
        waiting = asyncio.create_task(pool.call(time.sleep, 60))
        await asyncio.sleep(0.2)
        assert len(workers() - before) == 1
        pool.close()
        assert workers() == before
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(waiting, 5)
        assert await pool.call(abs, -2) == 2
        pool.close()

    asyncio.run(play())


SCRIPT = """
import asyncio, multiprocessing, sys
print("main is run", flush=True)
from turnwise.environments.equivalence import compare, prepare_worker
from turnwise.environments.killable_pool import KillablePool

pool = KillablePool(prepare_worker, workers=2, seconds=3)
print(asyncio.run(pool.call(compare, "0.5", "1/2")), flush=True)
"""


def test_a_script_needs_neither_a_main_guard_nor_close(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "main is run\nright\n", "")


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


def test_a_busy_worker_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT
        + "print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        + "asyncio.run(pool.call(pow, 3, 10**9))\n"
    )
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pids = [parent.stdout.readline() for _ in range(3)][2].split()
        time.sleep(0.5)
        parent.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_workers_compare(pool: KillablePool) -> None:
    assert asyncio.run(pool.call(compare, "0.5", r"\frac{1}{2}")) == "right"
