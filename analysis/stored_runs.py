"""Runs as they lie on disk: training runs, episode stores, plain files of episodes. Read one episode at a time."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.rl.credit_log import EpisodeCredit, read_credit
from turnwise.rl.episode_store import latest_lines, read_latest
from turnwise.rl.journal import read_lines
from turnwise.rl.run_folder import read_run

Figures = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class StoredEpisode:
    """An episode, with the training step in which it was played and the credit for it, where there are such."""

    episode: Episode
    step: int | None
    credit: EpisodeCredit | None


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A name to tell runs apart by, where they lie, and each file of episodes with its training step."""

    name: str
    path: Path
    stores: tuple[tuple[int | None, Path], ...]

    @property
    def about(self) -> dict[str, str | int | float]:
        """What `run.json` says; nothing for a plain file."""
        return read_run(self.path) if (self.path / "run.json").exists() else {}

    @property
    def metrics(self) -> list[Figures]:
        """The figures of each training step, in order, with its number as "step"."""
        path = self.path / "metrics.jsonl"
        return list(read_lines(path, _figures)) if path.exists() else []

    @property
    def tokenizers(self) -> list[Path]:
        """The folders of the run's own policies, as they were at first, and so of their tokenizers."""
        return sorted(self.path.glob("policies/*/r0"))

    def count(self) -> int:
        """The number of episodes."""
        return sum(len(latest_lines(path, _mended)) for _, path in self.stores)

    def episodes(self) -> Iterator[StoredEpisode]:
        """Every episode; of one that failed and was played again, the last. Raises InputError for a damaged line.

        Bytes that are no UTF-8, and halves of surrogate pairs, are read as the replacement character.
        """
        for step, path in self.stores:
            credit_path = path.with_name("credit.jsonl")
            credit = read_credit(credit_path) if credit_path.exists() else {}
            for episode in read_latest(path, _mended):
                yield StoredEpisode(episode, step, credit.get(episode.id))


def find_runs(paths: list[Path]) -> list[StoredRun]:
    """The runs in some folders and files: of a folder that is no run itself, those right below it.

    Raises InputError where there is none.
    """
    runs = [run for path in paths for run in _runs_at(path)]
    taken = [run.name for run in runs]
    # Two folders of one name are told apart by where they lie.
    return [replace(run, name=str(run.path)) if taken.count(run.name) > 1 else run for run in runs]


def _runs_at(path: Path) -> list[StoredRun]:
    if path.is_file():
        name = path.resolve().parent.name if path.name == "episodes.jsonl" else path.stem
        return [StoredRun(name, path, ((None, path),))]
    found = [run for folder in (path, *sorted(path.glob("*/"))) if (run := _run_in(folder))]
    if not found:
        raise InputError(
            f"a report needs the folder of a training run, of an episode store or of several, or an episodes.jsonl; "
            f"{path} {'holds' if path.exists() else 'is'} none"
        )
    return found[:1] if found[0].path == path else found


def _run_in(folder: Path) -> StoredRun | None:
    name = folder.resolve().name
    if (folder / "episodes.jsonl").exists():
        return StoredRun(name, folder, ((None, folder / "episodes.jsonl"),))
    stores = tuple((int(path.parent.name), path) for path in sorted(folder.glob("episodes/[0-9]*/episodes.jsonl")))
    return StoredRun(name, folder, stores) if stores or (folder / "metrics.jsonl").exists() else None


def _mended(line: bytes) -> bytes:
    """A line that orjson refuses, since it is no valid Unicode, as one that it reads."""
    text = json.dumps(json.loads(line.decode("utf-8", "replace")), ensure_ascii=False)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def _figures(line: bytes) -> Figures:
    figures: Figures = orjson.loads(line)
    if "step" not in figures:
        raise ValueError("it has no step")
    return figures
