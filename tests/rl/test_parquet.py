"""What is exported is what is stored."""

from pathlib import Path

import pytest
from datasets import load_dataset

from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.rl.episode_store import EpisodeStore
from turnwise.rl.parquet import export_parquet

PROBLEM = Problem("p1", "1 + 1?", "B", level=2, choices=("3", "2"))
REPLY = Reply(
    "<answer> B </answer>", 3, "stop", "</answer>", (5, 6, 7), (-0.1, -1e-9, -2.0), (1, 2), "abc", "tiny", 4, (4, 4, 5)
)
EPISODES = [
    Episode(Transcript(PROBLEM, (Step("long", "think", REPLY, "<think>"),)), 0, 2**62, Grade(Outcome.RIGHT, "B")),
    Episode(Transcript(PROBLEM), 1, 2**62, error="RuntimeError: no answer"),
]


def test_every_field_comes_back_through_datasets(tmp_path: Path) -> None:
    with EpisodeStore(tmp_path / "run", {"seed": 0}) as store:
        store.append(Episode(Transcript(PROBLEM), 0, 2**62, error="TimeoutError: "))  # and was played again
        for episode in EPISODES:
            store.append(episode)
    assert export_parquet(tmp_path / "run", tmp_path / "episodes.parquet") == 2
    first, second = load_dataset(
        "parquet", data_files=str(tmp_path / "episodes.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    (step,) = first.pop("steps")
    assert first == {
        "id": "p1#0", "sample": 0, "seed": 2**62, "outcome": "right", "answer": "B", "error": None,
        "problem": {
            "id": "p1", "question": "1 + 1?", "answer": "B", "level": 2, "subject": "", "solution": "",
            "choices": ["3", "2"],
        },
    }  # fmt: skip
    assert step == {
        "seat": "long", "state": "think", "prefill": "<think>", "text": "<answer> B </answer>", "token_count": 3,
        "finish": "stop", "stop": "</answer>", "token_ids": [5, 6, 7], "log_probabilities": [-0.1, -1e-9, -2.0],
        "prompt_token_ids": [1, 2], "tokenizer": "abc", "model": "tiny", "version": 4, "versions": [4, 4, 5],
    }  # fmt: skip
    assert (second["steps"], second["outcome"], second["error"]) == ([], None, "RuntimeError: no answer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "episodes.parquet", "run"]


def test_a_damaged_store_leaves_the_old_export_alone(tmp_path: Path) -> None:
    (tmp_path / "episodes.jsonl").write_text("{}\n")
    (tmp_path / "old.parquet").write_text("old")
    with pytest.raises(InputError, match="line 1"):
        export_parquet(tmp_path, tmp_path / "old.parquet")
    assert (tmp_path / "old.parquet").read_text() == "old"
