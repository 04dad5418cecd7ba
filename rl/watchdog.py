"""Says who waits for whom, where a stage takes longer than it should."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("turnwise")


@contextmanager
def watching(stage: str, waits_for: Callable[[], str], deadline: float) -> Iterator[None]:
    """Warns whenever another `deadline` (seconds) has passed within the `with`, by what `waits_for` says.

    That is called from another thread. The stage itself goes on: it may be slow, and not stuck.
    """
    ended, began = threading.Event(), time.monotonic()

    def watch() -> None:
        while not ended.wait(deadline):
            LOGGER.warning("%s has taken %.0f s; it waits for %s", stage, time.monotonic() - began, waits_for())

    thread = threading.Thread(target=watch, name="turnwise-watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
