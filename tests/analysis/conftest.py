"""A training run as it lies on disk, written by hand in the tokens of a tiny model."""

import shutil
from pathlib import Path

import orjson
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from turnwise.agents.chat import fingerprint
from turnwise.agents.tiny import LONG
from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.rl.episode_store import EpisodeStore

EASY = Problem("easy", "What is 2+4?", "6", level=1, solution="2+4=6")
HARD = Problem("hard", "What is 7·8, modulo 10?", "6", level=3)
THINK, ASK, ANSWER = ("long", "think"), ("short", "answer"), ("short", "answer")


class Writer:
    """Episodes of Long⊗Short in real tokens, each with a log-probability of −0.5."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(LONG / "tokenizer.json"))
        self.fingerprint = fingerprint(PreTrainedTokenizerFast(tokenizer_object=self.tokenizer))

    def episode(
        self, problem: Problem, sample: int, outcome: Outcome | None, *said: str, answer: str | None = None
    ) -> Episode:
        """One in which the seats take turns; each text closes with its tag. No outcome: an exception ended it."""
        before, steps = problem.statement, list[Step]()
        for place, text in enumerate(said):
            ids, prompt = (tuple(self.tokenizer.encode(part).ids) for part in (text, before))
            stop = text[text.rindex("</") :]
            reply = Reply(
                text, len(ids), "stop", stop, ids, (-0.5,) * len(ids), prompt, self.fingerprint, "tiny", version=3
            )
            steps.append(Step(*(ANSWER if place % 2 else THINK), reply))
            before += text
        grade = None if outcome is None else Grade(outcome, answer)
        error = "ConnectionError: the server <b>left</b>" if outcome is None else None
        return Episode(Transcript(problem, tuple(steps)), sample, 7, grade, error)


@pytest.fixture(scope="session")
def writer() -> Writer:
    return Writer()


def store(folder: Path, *episodes: Episode, step: int | None = None) -> Path:
    with EpisodeStore(folder, {"protocol": "by hand", **({} if step is None else {"step": step})}) as kept:
        for episode in episodes:
            kept.append(episode)
    return folder


@pytest.fixture(scope="session")
def training_run(tmp_path_factory: pytest.TempPathFactory, writer: Writer) -> Path:
    """Steps 1 and 2 of a run, of which the second has a credit log; one episode failed, one thinks again."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    right = ("<think>2+4=6</think>", "<answer> \\boxed{6}</answer>")
    again = (
        "<think>7×8=50, or am I overthinking?</think>", "<answer> is it?</rethink>", "<think>7×8=56</think>",
        "<answer> \\boxed{6}</answer>",
    )  # fmt: skip
    wrong = ("<think>2+4=7</think>", "<answer> \\boxed{7}</answer>")
    first = [
        writer.episode(EASY, 0, Outcome.RIGHT, *right, answer="6"),
        writer.episode(EASY, 1, Outcome.WRONG, *wrong, answer="7"),
        writer.episode(HARD, 0, None, "<think>hm</think>"),
    ]
    second = [
        writer.episode(HARD, 0, Outcome.RIGHT, *again, answer="6"),
        writer.episode(HARD, 1, Outcome.UNPARSABLE, *wrong),
    ]
    store(folder / "episodes" / "000001", *first, step=1)
    store(folder / "episodes" / "000002", *second, step=2)
    terms = {"hard#0": {"correctness": 1.0, "format": 0.5}, "hard#1": {"correctness": 0.0, "format": 1.0}}
    advantages = {"hard#0": [0.25, None, 0.25, None], "hard#1": [-0.25, None]}
    lines = [
        {"id": id, "rewards": {"long": {"terms": terms[id], "total": 0}}, "advantages": advantages[id]} for id in terms
    ]
    (folder / "episodes" / "000002" / "credit.jsonl").write_bytes(
        b"".join(orjson.dumps(line) + b"\n" for line in lines)
    )
    (folder / "run.json").write_text('{"format": 1, "protocol": "LongShort by hand"}')
    metrics = [{"step": 0, "evaluation/right": 0.5}, {"step": 1, "right": 0.5}, {"step": 2, "right": 0.75, "x": None}]
    (folder / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in metrics))
    shutil.copytree(LONG, folder / "policies" / "long" / "r0")
    return folder
