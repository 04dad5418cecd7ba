"""Parquet files by `datasets`, for pandas, DuckDB, or a data set of one's own on the hub; episodes as such."""

import errno
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, Features, List, Value  # type: ignore[import-untyped]
from datasets.exceptions import DatasetGenerationError  # type: ignore[import-untyped]

from turnwise.environments.benchmarks import quiet_datasets
from turnwise.environments.errors import InputError
from turnwise.rl.episode_store import read_latest
from turnwise.rl.run_folder import write_whole

_OF_PROBLEM = {
    **{name: Value("string") for name in ("id", "question", "answer", "subject", "solution")},
    "level": Value("int64"),
    "choices": List(Value("string")),
}
_OF_STEP = {name: Value("string") for name in ("seat", "state", "prefill")}
_OF_REPLY = {
    **{name: Value("string") for name in ("text", "finish", "stop", "tokenizer", "model")},
    "token_count": Value("int64"),
    "version": Value("int64"),
    "versions": List(Value("int64")),
    "prompt_token_ids": List(Value("int32")),
    "token_ids": List(Value("int32")),
    "log_probabilities": List(Value("float64")),
}
FEATURES = Features(
    {
        "id": Value("string"),
        "sample": Value("int64"),
        "seed": Value("int64"),
        "problem": _OF_PROBLEM,
        "outcome": Value("string"),
        "answer": Value("string"),
        "error": Value("string"),
        "steps": List({**_OF_STEP, **_OF_REPLY}),
    }
)
"""One row an episode, in the order in which they ended; `outcome` and `answer` are null where `error` is not."""


Row = Mapping[str, object]


def export_parquet(folder: str | Path, path: str | Path) -> int:
    """Writes the episodes of a store's folder to a Parquet file, and returns how many there are.

    Raises InputError for a damaged store, and as `write_rows` does.
    """
    return write_rows(path, _rows(Path(folder) / "episodes.jsonl"), FEATURES)


def write_rows(path: str | Path, rows: Iterable[Row], features: Features) -> int:
    """Writes rows to a Parquet file, whole or not at all, and returns how many they are; memory does not grow.

    Raises InputError for no rows at all and for a full disk, and whatever the making of a row raises.
    """
    rows = iter(rows)
    if (first := next(rows, None)) is None:
        raise InputError(f"a Parquet file holds at least one row, but there are none to write to {path}")
    with TemporaryDirectory() as cache, quiet_datasets():
        try:
            table = Dataset.from_generator(
                lambda: chain([first], rows), features=features, cache_dir=cache, fingerprint="rows"
            )
        except DatasetGenerationError as error:
            cause = error.__cause__ or error
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(
                    f"cannot write {path}: no space left in {cache}, where it is drafted; make room, or set TMPDIR "
                    "to a folder that has some"
                ) from None
            raise cause from None
        write_whole(Path(path), table.to_parquet)
        return len(table)


def _rows(episodes: Path) -> Iterator[Row]:
    for episode in read_latest(episodes):
        problem, grade = episode.transcript.problem, episode.grade
        yield {
            "id": episode.id,
            "sample": episode.sample,
            "seed": episode.seed,
            "problem": {name: getattr(problem, name) for name in _OF_PROBLEM},
            "outcome": grade and str(grade.outcome),
            "answer": grade and grade.answer,
            "error": episode.error,
            "steps": [
                {name: getattr(step, name) for name in _OF_STEP}
                | {name: getattr(step.reply, name) for name in _OF_REPLY}
                for step in episode.transcript.steps
            ],
        }
