"""Logs of Inspect's: what stands in them, and that Inspect's own loader reads them (make inspect)."""

import json
import os
from pathlib import Path

import pytest

from turnwise.analysis.inspect_log import export_inspect
from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.rl.episode_store import EpisodeStore

HOSTILE = "<script>alert(1)</script> \u202e \\(x\\) \x00 \x1b[31m 👩‍👩‍👧 \ufeff {{}} " + "y" * 100_000
PROBLEM = Problem("p1", "1 + 1?", "B", level=2, subject="sums", solution="It is 2.", choices=("3", "2"))
THOUGHT = Step(
    "long", "think", Reply(HOSTILE, 12, "length", None, (5, 6), (-0.1, -0.2), (1,), "abc", "big", 4), "<think>"
)
ANSWER = Step("short", "answer", Reply("<answer> B </answer>", 3, "stop", "</answer>", model="small"))
EPISODES = [
    Episode(Transcript(PROBLEM, (THOUGHT, ANSWER)), 0, 7, Grade(Outcome.RIGHT, "B")),
    Episode(Transcript(PROBLEM, (THOUGHT,)), 1, 7, Grade(Outcome.UNPARSABLE)),
    Episode(Transcript(Problem("p2", "2?", "2")), 0, 7, error="RuntimeError: no answer"),
    Episode(Transcript(Problem("p3", "3?", ""), (ANSWER,)), 0, 7),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    with EpisodeStore(folder, {"protocol": "LongShort abc", "problems": "sums", "seed": 7}) as store:
        # One that failed and was played again.
        store.append(Episode(Transcript(PROBLEM), 0, 7, error="TimeoutError: "))
        for episode in EPISODES:
            store.append(episode)
    os.utime(folder / "episodes.jsonl", (1_700_000_000, 1_700_000_000))
    return folder


def usage(read: int, sampled: int) -> dict[str, int]:
    return {"input_tokens": read, "output_tokens": sampled, "total_tokens": read + sampled}


def test_what_stands_in_a_log(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.json"
    assert export_inspect(run, path) == 4
    log = json.loads(path.read_text())
    assert (log["version"], log["status"], log["eval"]["task"]) == (2, "success", "run")
    assert log["eval"]["created"] == "2023-11-14T22:13:20+00:00"
    assert log["eval"]["dataset"] == {"name": "sums", "samples": 3, "sample_ids": ["p1", "p2", "p3"]}
    assert log["eval"]["model"] == "turnwise/LongShort abc"
    assert log["eval"]["model_roles"] == {"long": {"model": "big"}, "short": {"model": "small"}}
    assert log["eval"]["config"] == {"epochs": 2}
    assert log["eval"]["metadata"] == {"format": 1, "protocol": "LongShort abc", "problems": "sums", "seed": 7}
    assert log["results"] == {
        "total_samples": 4, "completed_samples": 3,
        "scores": [{
            "name": "answer", "scorer": "answer", "scored_samples": 2, "unscored_samples": 2,
            "metrics": {
                "accuracy": {"name": "accuracy", "value": 0.5},
                "tokens": {"name": "tokens", "value": (15 + 12) / 2},
            },
        }],
    }  # fmt: skip
    assert log["stats"]["model_usage"] == {"big": usage(2, 24), "small": usage(0, 6)}
    assert log["stats"]["role_usage"] == {"long": usage(2, 24), "short": usage(0, 6)}
    first, second, failed, ungraded = log["samples"]
    assert (first["id"], first["epoch"], first["uuid"]) == ("p1", 1, "p1#0")
    assert (first["input"], first["target"], first["choices"]) == ("1 + 1?", "B", ["3", "2"])
    assert [message["role"] for message in first["messages"]] == ["user", "assistant", "assistant"]
    assert first["messages"][0]["content"] == "1 + 1?\n(A) 3\n(B) 2"
    assert first["messages"][1]["content"] == "<think>" + HOSTILE
    assert first["messages"][1]["metadata"] == {
        "seat": "long", "state": "think", "prefill": "<think>", "tokens": 12, "finish": "length", "stop": None,
        "version": 4,
    }  # fmt: skip
    assert [event["role"] for event in first["events"]] == ["long", "short"]
    assert first["events"][0]["output"]["choices"][0]["stop_reason"] == "max_tokens"
    assert first["output"]["choices"][0]["message"]["content"] == "<answer> B </answer>"
    assert first["scores"] == {"answer": {"value": "C", "answer": "B", "metadata": {"outcome": "right"}}}
    assert second["scores"]["answer"] == {"value": "I", "answer": None, "metadata": {"outcome": "unparsable"}}
    assert second["epoch"] == 2
    assert failed["error"]["message"] == "RuntimeError: no answer"
    assert "scores" not in failed
    assert not ungraded.keys() & {"scores", "error"}


SAID = (("assistant", "imported"), ("tool", ""), ("user", ""))
CHAT = Transcript(PROBLEM, tuple(Step(role, role, Reply("4", int(bool(model)), model=model)) for role, model in SAID))


def test_who_was_not_sampled_is_no_assistant(tmp_path: Path) -> None:
    with EpisodeStore(tmp_path / "run", {"protocol": "chat log"}) as store:
        store.append(Episode(CHAT, 0, 0))
    export_inspect(tmp_path / "run", tmp_path / "run.json")
    (sample,) = (log := json.loads((tmp_path / "run.json").read_text()))["samples"]
    assert [message["role"] for message in sample["messages"]] == ["user", "assistant", "tool", "user"]
    assert [event["role"] for event in sample["events"]] == ["assistant"]
    assert sample["output"]["choices"][0]["message"] == sample["messages"][1]
    assert sample["model_usage"] == log["stats"]["model_usage"] == {"imported": usage(0, 1)}
    assert (log["eval"]["model"], list(log["eval"]["model_roles"])) == ("imported", ["assistant"])


def test_the_same_run_is_the_same_log(run: Path, tmp_path: Path) -> None:
    export_inspect(run, tmp_path / "a.json")
    export_inspect(run, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_run_in_which_nothing_was_graded_has_no_figures(tmp_path: Path) -> None:
    with EpisodeStore(tmp_path / "run", {"seed": 0}) as store:
        store.append(EPISODES[2])
    export_inspect(tmp_path / "run", tmp_path / "run.json")
    log = json.loads((tmp_path / "run.json").read_text())
    assert log["results"]["scores"][0]["metrics"] == {}
    assert log["samples"][0]["output"] == {"model": "", "choices": []}


def test_what_cannot_be_exported_leaves_the_old_log_alone(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("old")
    with pytest.raises(InputError, match=r"ends in \.json; got .*old\.eval"):
        export_inspect(run, tmp_path / "old.eval")
    with (run / "episodes.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(InputError, match="line 6"):
        export_inspect(run, old)
    (run / "episodes.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no episodes"):
        export_inspect(run, old)
    (run / "episodes.jsonl").unlink()
    with pytest.raises(InputError, match=r"no episodes\.jsonl"):
        export_inspect(run, old)
    assert old.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.json", "run"]


@pytest.mark.filterwarnings("ignore")  # Inspect's and its packages' own
def test_inspects_own_loader_reads_it(run: Path, tmp_path: Path) -> None:
    log_module = pytest.importorskip("inspect_ai.log", reason="needs inspect_ai: make inspect")
    path = tmp_path / "run.json"
    with EpisodeStore(tmp_path / "chats", {"protocol": "chat log"}) as store:
        store.append(Episode(CHAT, 0, 0))
    export_inspect(store.folder, path)
    (chat,) = log_module.read_eval_log(str(path)).samples
    assert [message.role for message in chat.messages] == ["user", "assistant", "tool", "user"]
    assert [event.role for event in chat.events] == ["assistant"]
    export_inspect(run, path)
    header = log_module.read_eval_log(str(path), header_only=True)
    assert (header.status, header.eval.task, header.samples) == ("success", "run", None)
    assert header.results.scores[0].metrics["accuracy"].value == 0.5
    log = log_module.read_eval_log(str(path))
    assert [(sample.id, sample.epoch) for sample in log.samples] == [("p1", 1), ("p1", 2), ("p2", 1), ("p3", 1)]
    first = log.samples[0]
    assert first.messages[1].content == "<think>" + HOSTILE
    assert first.messages[1].metadata["seat"] == "long"
    assert first.scores["answer"].value == "C"
    assert first.output.completion == "<answer> B </answer>"
    assert [(event.event, event.role, event.output.usage.output_tokens) for event in first.events] == [
        ("model", "long", 12),
        ("model", "short", 3),
    ]
    assert log.samples[2].error.message == "RuntimeError: no answer"
    assert log.samples[3].scores is None
    # What Inspect writes of it, it reads again.
    log_module.write_eval_log(log, str(tmp_path / "again.eval"))
    again = log_module.read_eval_log(str(tmp_path / "again.eval"))
    assert again.samples[0].messages[1].content == "<think>" + HOSTILE
