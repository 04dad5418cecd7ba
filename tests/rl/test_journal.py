import errno
import os
from pathlib import Path

import orjson
import pytest

from turnwise.environments.errors import InputError
from turnwise.rl.journal import Journal, read_lines

RUN: dict[str, str | int | float] = {"protocol": "test"}


def test_lines_are_written_whole_and_read_in_order(tmp_path: Path) -> None:
    with Journal(tmp_path / "run", RUN, "some.jsonl") as journal:
        journal.write(b'{"n":1}')
        assert list(read_lines(journal.path, orjson.loads)) == [{"n": 1}], "it is there at once"
        journal.write(b'{"n":2}')
    with Journal(tmp_path / "run", RUN, "some.jsonl") as journal:
        journal.write(b"3")
    assert (tmp_path / "run" / "some.jsonl").read_bytes() == b'{"n":1}\n{"n":2}\n3\n'
    assert list(read_lines(tmp_path / "run" / "some.jsonl", orjson.loads)) == [{"n": 1}, {"n": 2}, 3]


@pytest.mark.parametrize(
    ("held", "kept"),
    [(b"", b""), (b"1", b""), (b"1\n", b"1\n"), (b"1\n2", b"1\n"), (b"1\n\0\0\0", b"1\n"), (b"1\n2\n", b"1\n2\n")],
)
def test_what_is_behind_the_last_line_break_is_cut_off(tmp_path: Path, held: bytes, kept: bytes) -> None:
    path = tmp_path / "run" / "some.jsonl"
    Journal(tmp_path / "run", RUN, "some.jsonl").close()
    path.write_bytes(held)
    with Journal(tmp_path / "run", RUN, "some.jsonl") as journal:
        assert path.read_bytes() == kept
        journal.write(b"3")
    assert path.read_bytes() == kept + b"3\n"


def test_a_line_that_is_written_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:3]))
    with Journal(tmp_path / "run", RUN, "some.jsonl") as journal:
        journal.write(b"1234567")
        journal.write(b"")
    assert journal.path.read_bytes() == b"1234567\n\n"


def test_a_line_for_which_there_is_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = os.write, [5]

    def full(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(file, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", full)
    with Journal(tmp_path / "run", RUN, "some.jsonl") as journal:
        journal.write(b"12")
        expected = r"^cannot write to .*some\.jsonl: No space left on device; what it holds is safe: make room"
        with pytest.raises(InputError, match=expected):
            journal.write(b"34567")
        assert journal.path.read_bytes() == b"12\n"
        room[0] = 10
        journal.write(b"34567")
    assert journal.path.read_bytes() == b"12\n34567\n"


def test_reading_leaves_out_a_torn_last_line_and_names_another(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"n":1}\n{"n":')
    assert list(read_lines(path, orjson.loads)) == [{"n": 1}]
    path.write_bytes(b'{"n":1}\n{"m":2}\n{"n":3}\n')
    read = read_lines(path, lambda line: orjson.loads(line)["n"])
    assert next(read) == 1
    with pytest.raises(InputError, match=r"^line 2 of .*some\.jsonl is damaged: 'n'; remove that line$"):
        next(read)


def test_a_folder_is_given_back_where_opening_fails(tmp_path: Path) -> None:
    with Journal(tmp_path / "run", RUN, "some.jsonl"):
        files = len(list(Path("/dev/fd").iterdir()))
        with pytest.raises(InputError, match=r"another process is writing to .*run; wait for it"):
            Journal(tmp_path / "run", RUN, "some.jsonl")
        with pytest.raises(InputError, match=r"protocol: 'test' there, 'other' here"):
            Journal(tmp_path / "run", {"protocol": "other"}, "some.jsonl")
        assert len(list(Path("/dev/fd").iterdir())) == files
        Journal(tmp_path / "run", RUN, "other.jsonl").close()  # of the same run, and not being written to
    Journal(tmp_path / "run", RUN, "some.jsonl").close()
