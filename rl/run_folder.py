"""A folder that holds one run and says which, and files in it that a kill or a full disk never leaves half written."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import orjson

from turnwise.environments.errors import InputError

FORMAT = 1

Run = Mapping[str, str | int | float]
"""What must be equal for two runs to be the same one (protocol, models, problems, seed)."""


def claim(folder: Path, run: Run) -> None:
    """Makes `folder` that of `run`, or checks that it already is. Raises InputError where it holds something else."""
    described = folder / "run.json"
    mine = orjson.loads(orjson.dumps({"format": FORMAT, **run}))
    if described.exists():
        held = read_run(folder)
        different = sorted(key for key in held | mine if held.get(key) != mine.get(key))
        if different:
            told = ", ".join(f"{key}: {held.get(key)!r} there, {mine.get(key)!r} here" for key in different)
            raise InputError(f"{folder} holds another run ({told}); choose another folder or remove it")
        return
    draft = _draft(described)  # a kill may have left one
    if folder.exists() and (not folder.is_dir() or any(path != draft for path in folder.iterdir())):
        raise InputError(f"{folder} exists and holds no run; choose a new or an empty folder")
    write_whole(described, lambda path: path.write_bytes(orjson.dumps(mine, option=orjson.OPT_INDENT_2)))


def read_run(folder: str | Path) -> dict[str, str | int | float]:
    """What `run.json` of a folder says."""
    try:
        run: dict[str, str | int | float] = orjson.loads((Path(folder) / "run.json").read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise InputError(f"{folder} holds no readable run.json: {error}") from None
    return run


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a draft's path, then puts the draft in the place of `path`, a file or a folder.

    A file is replaced in one move; of a folder the old one goes first, and a kill in between leaves the draft alone.
    Raises InputError where it cannot be written; what stood at `path` is then untouched.
    """
    draft = _draft(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(draft)
        write(draft)
        if path.is_dir():
            _remove(path)
        draft.replace(path)
    except (OSError, RuntimeError) as error:  # the latter is what torch makes of a full disk
        with suppress(OSError):
            _remove(draft)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise InputError(f"cannot write {path}: {reason}; make room and run the same command again") from error


def _draft(path: Path) -> Path:
    return path.with_name(path.name + ".draft")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
