"""What takes longer than it should is told, with who waits for whom; what does not, is not."""

import threading

import pytest

from turnwise.rl.watchdog import watching


def test_a_stage_that_passes_its_deadline_is_named_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    asked, late = threading.Semaphore(0), iter(["rank(s) [0, 1]", "rank(s) [1]", "rank(s) [1]"])

    def waits_for() -> str:
        asked.release()
        return next(late, "nobody")

    with watching("the update of step 3", waits_for, 0.01):
        for _ in range(3):
            assert asked.acquire(timeout=600)
    first, second, *_ = caplog.messages
    assert first.startswith("the update of step 3 has taken ")
    assert first.endswith(" s; it waits for rank(s) [0, 1]")
    assert second.endswith(" s; it waits for rank(s) [1]")


def test_a_stage_in_time_is_not_told_and_its_error_is_its_own(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError), watching("division", lambda: "nobody", 1e6):
        print(1 / 0)
    assert caplog.messages == []
    assert "turnwise-watchdog" not in {thread.name for thread in threading.enumerate()}
