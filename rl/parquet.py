"""Stored episodes as Parquet, by `datasets`, for pandas, DuckDB, or a data set of one's own on the hub."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, Features, List, Value  # type: ignore[import-untyped]
from datasets.exceptions import DatasetGenerationError  # type: ignore[import-untyped]

from turnwise.environments.benchmarks import quiet_datasets
from turnwise.rl.episode_store import read_episodes

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


def export_parquet(folder: str | Path, path: str | Path) -> int:
    """Writes the episodes of a store's folder to a Parquet file, whole or not at all; returns how many there are.

    Episodes pass through one at a time, so that memory does not grow with them. Raises InputError for a damaged store.
    """
    path = Path(path)
    draft = path.with_name(path.name + ".draft")
    with TemporaryDirectory() as cache, quiet_datasets():
        try:
            table = Dataset.from_generator(
                _rows, features=FEATURES, cache_dir=cache, gen_kwargs={"episodes": Path(folder) / "episodes.jsonl"}
            )
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None
        table.to_parquet(draft)
        count = len(table)
    draft.replace(path)
    return count


def _rows(episodes: Path) -> Iterator[Mapping[str, object]]:
    for episode in read_episodes(episodes):
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
