import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import turnwise
from turnwise.environments.errors import InputError
from turnwise.rl.run_folder import claim, read_run, write_whole

RUN: dict[str, str | int | float] = {"protocol": "test", "seed": 0}


def fill(text: str) -> Callable[[Path], None]:
    """Writes a folder of two files, one of them in a folder of its own."""

    def write(path: Path) -> None:
        (path / "inner").mkdir(parents=True)
        (path / "first").write_text(text)
        (path / "inner" / "second").write_text(text)

    return write


def broken(write: Callable[[Path], object], error: BaseException) -> Callable[[Path], None]:
    """Writes, and then fails."""

    def fail(path: Path) -> None:
        write(path)
        raise error

    return fail


def told(folder: Path) -> dict[str, str]:
    """Each file under a folder, with its text."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


# A file or a folder is there whole, or as it was


def test_a_file_is_made_and_replaced_in_folders_that_are_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "file"
    for text in ("one", "two"):
        write_whole(path, lambda draft, text=text: draft.write_text(text))  # type: ignore[misc]
        assert told(tmp_path) == {"deep/down/file": text}


def test_a_folder_is_made_and_replaced_and_nothing_of_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    write_whole(path, fill("one"))
    assert told(tmp_path) == {"deep/folder/first": "one", "deep/folder/inner/second": "one"}
    (path / "old").write_text("old")
    write_whole(path, fill("two"))
    assert told(tmp_path) == {"deep/folder/first": "two", "deep/folder/inner/second": "two"}


def test_a_file_may_take_the_place_of_a_folder_and_a_folder_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "it"
    write_whole(path, fill("one"))
    write_whole(path, lambda draft: draft.write_text("two"))
    assert told(tmp_path) == {"it": "two"}
    path.unlink()
    write_whole(path, fill("three"))
    assert told(tmp_path) == {"it/first": "three", "it/inner/second": "three"}


def test_nothing_is_at_the_path_before_all_is_written(tmp_path: Path) -> None:
    path, seen = tmp_path / "file", list[str | None]()

    def write(draft: Path) -> None:
        for text in ("half", "whole"):
            draft.write_text(text)
            seen.append(path.read_text() if path.exists() else None)

    write_whole(path, write)
    assert seen == [None, None]
    write_whole(path, write)
    assert seen[2:] == ["whole", "whole"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("the disk is full"), "the disk is full"),
        (RuntimeError("unexpected pos 9 vs 8\nframe 0"), "unexpected pos 9 vs 8"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_what_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, error: Exception, reason: str, folder: bool
) -> None:
    path = tmp_path / "it"
    for before in ({}, {"it/first": "old", "it/inner/second": "old"} if folder else {"it": "old"}):
        if before:
            write_whole(path, fill("old") if folder else lambda draft: draft.write_text("old"))
        with pytest.raises(InputError) as raised:
            write_whole(path, broken(fill("new") if folder else lambda draft: draft.write_text("new"), error))
        assert str(raised.value) == f"cannot write {path}: {reason}; make room and run the same command again"
        assert raised.value.__cause__ is error
        assert told(tmp_path) == before


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_any_other_exception_leaves_what_was_there_too(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "it"
    write_whole(path, fill("old"))
    with pytest.raises(type(error)):
        write_whole(path, broken(fill("new"), error))
    assert told(path) == {"first": "old", "inner/second": "old"}
    write_whole(path, fill("new"))
    assert told(tmp_path) == {"it/first": "new", "it/inner/second": "new"}


@pytest.mark.parametrize("junk", ["file", "folder"])
@pytest.mark.parametrize("whole", ["file", "folder"])
def test_a_draft_that_a_kill_left_is_removed(tmp_path: Path, junk: str, whole: str) -> None:
    draft = tmp_path / "it.draft"
    if junk == "file":
        draft.write_text("{")
    else:
        fill("half")(draft)
        (draft / "third").write_text("half")
    write_whole(tmp_path / "it", fill("new") if whole == "folder" else lambda path: path.write_text("new"))
    expected = {"it": "new"} if whole == "file" else {"it/first": "new", "it/inner/second": "new"}
    assert told(tmp_path) == expected


def test_a_kill_in_the_midst_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    killed = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from turnwise.rl.run_folder import write_whole\n"
        "def write(draft):\n"
        "    draft.write_text('ne')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_whole(Path(sys.argv[1]), write)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(turnwise.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", killed, str(path)], env=environment, check=False, timeout=600)
    assert done.returncode == -signal.SIGKILL
    assert told(tmp_path) == {"file": "old", "file.draft": "ne"}
    write_whole(path, lambda draft: draft.write_text("new"))
    assert told(tmp_path) == {"file": "new"}


# Whose folder it is (more of it in test_episode_store.py)


def test_a_claimed_folder_says_whose_it_is_and_may_be_claimed_again(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    claim(folder, RUN)
    assert read_run(folder) == {"format": 1, **RUN}
    assert json.loads((folder / "run.json").read_text()) == {"format": 1, **RUN}
    (folder / "more").write_text("of this run")
    before = told(folder)
    claim(folder, dict(reversed(RUN.items())))
    assert told(folder) == before


def test_each_difference_is_told_with_both_its_sides(tmp_path: Path) -> None:
    claim(tmp_path / "run", RUN)
    with pytest.raises(InputError) as error:
        claim(tmp_path / "run", {"protocol": "other", "rounds": "long"})
    assert str(error.value) == (
        f"{tmp_path / 'run'} holds another run (protocol: 'test' there, 'other' here, rounds: None there, 'long' here, "
        "seed: 0 there, None here); choose another folder or remove it"
    )


def test_a_run_of_another_format_is_another_run(tmp_path: Path) -> None:
    claim(tmp_path, RUN)
    (tmp_path / "run.json").write_text(json.dumps({"format": 0, **RUN}))
    with pytest.raises(InputError, match=r"holds another run \(format: 0 there, 1 here\)"):
        claim(tmp_path, RUN)


def test_a_folder_is_claimed_after_a_kill_before_it_was_but_not_with_anything_else_in_it(tmp_path: Path) -> None:
    (tmp_path / "run.json.draft").write_text("{")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="exists and holds no run; choose a new or an empty folder"):
        claim(tmp_path, RUN)
    (tmp_path / "thesis.tex").unlink()
    claim(tmp_path, RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^cannot write .*/file/run/run\.json: Not a directory; "):
        claim(tmp_path / "file" / "run", RUN)
    with pytest.raises(InputError, match=r"^cannot write .*/file/it: File exists; "):
        write_whole(tmp_path / "file" / "it", lambda draft: draft.write_text(""))
    assert told(tmp_path) == {"file": ""}


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no readable run\.json: \[Errno 2\]"):
        read_run(tmp_path)
    claim(tmp_path / "run", RUN)
    shutil.copy(tmp_path / "run" / "run.json", tmp_path / "whole")
    (tmp_path / "run" / "run.json").write_text((tmp_path / "whole").read_text()[:20])
    with pytest.raises(InputError, match=r"holds no readable run\.json: "):
        claim(tmp_path / "run", RUN)
