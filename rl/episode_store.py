"""An append-only store of episodes that survives a kill and a full disk."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import orjson

from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.rl.journal import Journal, read_lines
from turnwise.rl.run_folder import Run

T = TypeVar("T")
Mend = Callable[[bytes], bytes]


class EpisodeStore(Journal):
    """A folder with `run.json`, which says what run it holds, and `episodes.jsonl`, one episode a line.

    An episode whose line was torn is played again. An episode that failed may be appended a second time: the last one
    counts. `ids` are those of the episodes that did not fail.
    """

    def __init__(self, folder: str | Path, run: Run) -> None:
        super().__init__(folder, run, "episodes.jsonl")
        try:
            self.ids = {id for id, error in read_lines(self.path, _identify) if error is None}
        except BaseException:
            self.close()
            raise

    def append(self, episode: Episode) -> None:
        """Writes one episode."""
        self.write(encode(episode))
        if episode.error is None:
            self.ids.add(episode.id)

    def __iter__(self) -> Iterator[Episode]:
        """Every episode, in the order in which they ended; of one that was played again, the last."""
        return read_latest(self.path)


def read_episodes(path: str | Path) -> Iterator[Episode]:
    """The episodes of an `episodes.jsonl`, one at a time. Raises InputError, with the line, for a damaged one."""
    return read_lines(path, decode)


def read_latest(path: str | Path, mend: Mend | None = None) -> Iterator[Episode]:
    """As `read_episodes`; but of one that failed and was played again, the last alone.

    `mend` makes JSON of a line that is none.
    """
    last = latest_lines(path, mend)
    return (e for number, e in enumerate(read_lines(path, _mending(decode, mend))) if last[e.id] == number)


def latest_lines(path: str | Path, mend: Mend | None = None) -> dict[str, int]:
    """The number of the last line, from 0, of each episode by its id."""
    return {id: number for number, (id, _) in enumerate(read_lines(path, _mending(_identify, mend)))}


def _mending(parse: Callable[[bytes], T], mend: Mend | None) -> Callable[[bytes], T]:
    def mended(line: bytes) -> T:
        try:
            return parse(line)
        except orjson.JSONDecodeError:
            if mend is None:
                raise
            return parse(mend(line))

    return mended


def encode(episode: Episode) -> bytes:
    """One line of JSON. Of each prompt only what the seat has not read or said before is written."""
    said: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}  # by each seat: its last prompt, and its reply
    steps = []
    for step in episode.transcript.steps:
        reply, prompt = step.reply, step.reply.prompt_token_ids
        before, reply_before = said.get(step.seat, ((), ()))
        shared = len(before) + len(reply_before)
        if prompt[: len(before)] != before or prompt[len(before) : shared] != reply_before:
            shared = 0
        if reply.token_ids:
            said[step.seat] = prompt, reply.token_ids
        steps.append({
            "seat": step.seat, "state": step.state, "prefill": step.prefill, "text": reply.text,
            "token_count": reply.token_count, "finish": reply.finish, "stop": reply.stop,
            "prompt_shared": shared, "prompt_token_ids": prompt[shared:], "token_ids": reply.token_ids,
            "log_probabilities": reply.log_probabilities, "tokenizer": reply.tokenizer, "model": reply.model,
            "version": reply.version, **({"versions": reply.versions} if reply.versions else {}),
        })  # fmt: skip
    return orjson.dumps({
        "id": episode.id, "sample": episode.sample, "seed": episode.seed, "grade": episode.grade,
        "error": episode.error, "problem": episode.transcript.problem, "steps": steps,
    })  # fmt: skip


def decode(line: bytes) -> Episode:
    """The episode that `encode` wrote, equal to the one that was written."""
    record = orjson.loads(line)
    said: dict[str, tuple[int, ...]] = {}
    steps = []
    for step in record["steps"]:
        token_ids = tuple(step["token_ids"])
        prompt = said.get(step["seat"], ())[: step["prompt_shared"]] + tuple(step["prompt_token_ids"])
        if token_ids:
            said[step["seat"]] = prompt + token_ids
        reply = Reply(
            text=step["text"], token_count=step["token_count"], finish=step["finish"], stop=step["stop"],
            token_ids=token_ids, log_probabilities=tuple(step["log_probabilities"]), prompt_token_ids=prompt,
            tokenizer=step["tokenizer"], model=step["model"], version=step["version"],
            versions=tuple(step.get("versions", ())),
        )  # fmt: skip
        steps.append(Step(step["seat"], step["state"], reply, step["prefill"]))
    problem = record["problem"]
    problem = Problem(
        id=problem["id"], question=problem["question"], answer=problem["answer"], level=problem["level"],
        subject=problem["subject"], solution=problem["solution"], choices=tuple(problem["choices"]),
    )  # fmt: skip
    grade = record["grade"] and Grade(Outcome(record["grade"]["outcome"]), record["grade"]["answer"])
    return Episode(Transcript(problem, tuple(steps)), record["sample"], record["seed"], grade, record["error"])


def _identify(line: bytes) -> tuple[str, str | None]:
    """Id and error alone: to open a large store, its token ids need not be made into tuples."""
    record = orjson.loads(line)
    return record["id"], record["error"]
