"""A file of JSON lines that a kill or a full disk never costs more than the line being written."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from turnwise.environments.errors import InputError
from turnwise.rl.run_folder import Run, claim

T = TypeVar("T")


class Journal:
    """An append-only file in a run's folder, one record a line, each written whole.

    A line that a kill or a full disk left torn is cut off when the journal is next opened.

    Raises InputError where the folder holds another run or something else, where another process is writing to it, and
    where a line cannot be written; those before it are safe.
    """

    def __init__(self, folder: str | Path, run: Run, name: str) -> None:
        self.folder = Path(folder)
        claim(self.folder, run)
        self.path = self.folder / name
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._size = _whole_lines(self._file)
            os.ftruncate(self._file, self._size)
        except BaseException:
            os.close(self._file)
            raise

    def write(self, record: bytes) -> None:
        """Appends one line."""
        line = record + b"\n"
        try:
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise InputError(
                f"cannot write to {self.path}: {error.strerror}; what it holds is safe: "
                "make room and run the same command again"
            ) from error
        self._size += len(line)

    def close(self) -> None:
        """Gives the folder back."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another process is writing to {self.folder}; wait for it or choose another folder"
            ) from None


def read_lines(path: str | Path, parse: Callable[[bytes], T]) -> Iterator[T]:
    """Each line of a journal, parsed. A torn last line is left out; raises InputError, with the line, for others."""
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield parse(line)
            except (KeyError, TypeError, ValueError) as error:  # no JSON at all is a ValueError
                if not line.endswith(b"\n"):
                    return
                raise InputError(f"line {number} of {path} is damaged: {error}; remove that line") from None


def _whole_lines(file: int) -> int:
    """The number of bytes up to the end of the last whole line."""
    end = os.lseek(file, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
