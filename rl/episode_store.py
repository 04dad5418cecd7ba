"""An append-only store of episodes that survives a kill and a full disk."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import orjson

from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.rl.run_folder import Run, claim

T = TypeVar("T")


class EpisodeStore:
    """A folder with `run.json`, which says what run it holds, and `episodes.jsonl`, one episode a line.

    Each episode is appended whole, in one write. A line that a kill or a full disk left torn is cut off when the store
    is next opened, and its episode is played again. An episode that failed may be appended a second time: the last
    one counts.

    Raises InputError where the folder holds another run or something else, where another process is writing to it, and
    where an episode cannot be written; those before it are safe.
    """

    def __init__(self, folder: str | Path, run: Run) -> None:
        self.folder = Path(folder)
        claim(self.folder, run)
        self._path = self.folder / "episodes.jsonl"
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._size = _whole_lines(self._file)
            os.ftruncate(self._file, self._size)
            self.ids = {id for id, error in _read(self._path, _identify) if error is None}
        except BaseException:
            os.close(self._file)
            raise

    def append(self, episode: Episode) -> None:
        """Writes one episode."""
        line = encode(episode) + b"\n"
        try:
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise InputError(
                f"cannot write to {self._path}: {error.strerror}; {len(self.ids)} episodes are safe: "
                "make room and run the same command again"
            ) from error
        self._size += len(line)
        if episode.error is None:
            self.ids.add(episode.id)

    def __iter__(self) -> Iterator[Episode]:
        """Every episode, in the order in which they ended; of one that was played again, the last."""
        latest = {id: line for line, (id, _) in enumerate(_read(self._path, _identify))}
        return (e for line, e in enumerate(read_episodes(self._path)) if latest[e.id] == line)

    def close(self) -> None:
        """Gives the folder back."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another process is writing to {self.folder}; wait for it or choose another folder"
            ) from None


def read_episodes(path: str | Path) -> Iterator[Episode]:
    """The episodes of an `episodes.jsonl`, one at a time. Raises InputError, with the line, for a damaged one."""
    return _read(path, decode)


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
            "version": reply.version,
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
        )  # fmt: skip
        steps.append(Step(step["seat"], step["state"], reply, step["prefill"]))
    problem = record["problem"]
    problem = Problem(
        id=problem["id"], question=problem["question"], answer=problem["answer"], level=problem["level"],
        subject=problem["subject"], solution=problem["solution"], choices=tuple(problem["choices"]),
    )  # fmt: skip
    grade = record["grade"] and Grade(Outcome(record["grade"]["outcome"]), record["grade"]["answer"])
    return Episode(Transcript(problem, tuple(steps)), record["sample"], record["seed"], grade, record["error"])


def _read(path: str | Path, parse: Callable[[bytes], T]) -> Iterator[T]:
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield parse(line)
            except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                if not line.endswith(b"\n"):
                    return
                raise InputError(f"line {number} of {path} is damaged: {error}; remove that line") from None


def _identify(line: bytes) -> tuple[str, str | None]:
    """Id and error alone: to open a large store, its token ids need not be made into tuples."""
    record = orjson.loads(line)
    return record["id"], record["error"]


def _whole_lines(file: int) -> int:
    """The number of bytes up to the end of the last whole line."""
    end = os.lseek(file, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
