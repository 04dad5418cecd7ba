"""Plain chat logs, `{"messages": [{"role": ..., "content": ...}]}` a line, as an episode store, for analysis."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from turnwise.agents.stored_answers import count_words
from turnwise.environments.environment import Grader
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.json_lines import json_object, numbered_lines
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.rl.episode_store import EpisodeStore

TOGETHER, SHOWN = 64, 5  # lines that are graded at once; damaged ones that an error names


class ChatColumns(BaseModel):
    """Which keys of a line hold what: the chat, and, where a line has them, the problem's id, text and gold answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    messages: str = "messages"
    id: str = "id"
    problem: str = "problem"
    answer: str = "answer"


class _Part(BaseModel):
    type: str = "text"
    text: str = ""


class _Said(BaseModel):
    role: str
    content: str | list[_Part] | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content if part.type == "text")
        return self.content or ""


_MESSAGES = TypeAdapter(list[_Said])


@dataclass(frozen=True, slots=True)
class Imported:
    """How many chats a file holds, how many of them have a gold answer and so are graded, and how many are right."""

    chats: int
    graded: int
    right: int


def import_chats(
    source: str | Path, folder: str | Path, grader: Grader, *, columns: ChatColumns | None = None
) -> Imported:
    """Puts the chats of a JSONL file into an episode store; those with a gold answer are graded by their last reply.

    What comes before the first reply is the problem, unless the line names one; each message after that is a turn,
    whose seat is its `name`, or else its role. Of the assistants' turns the words are counted as tokens, since a log
    has no others; other turns were not sampled. A line without an id has one by its problem, and lines with the same id
    are samples of one problem.

    A file is imported whole or not at all: nothing is written where a line is damaged. Stopped, the same call goes on.
    Raises InputError, with the numbers of the lines, for those that hold no such chat, and as an `EpisodeStore` does.
    """
    path, columns = Path(source), columns or ChatColumns()
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a JSONL file of chats") from None
    _check(path, columns)
    with EpisodeStore(folder, {"protocol": "chat log", "problems": path.name, "content": digest}) as store:
        missing = (episode for episode in _episodes(path, columns) if episode.id not in store.ids)
        while chunk := list(islice(missing, TOGETHER)):
            for graded in asyncio.run(_graded(chunk, grader)):
                store.append(graded)
        kept = [(episode.grade is not None, episode.right) for episode in store]
    graded_count, right = (sum(column) for column in zip(*kept, strict=True))
    return Imported(len(kept), graded_count, right)


async def _graded(chunk: list[Episode], grader: Grader) -> list[Episode]:
    async def grade(episode: Episode) -> Episode:
        problem = episode.transcript.problem
        if not problem.answer:
            return episode
        last = [step.text for step in episode.transcript.steps if step.state == "assistant"][-1]
        return Episode(episode.transcript, episode.sample, episode.seed, await grader.grade(problem, last))

    return await asyncio.gather(*map(grade, chunk))


def _check(path: Path, columns: ChatColumns) -> None:
    faults, known, chats = list[str](), dict[str, Problem](), 0
    for number, line in numbered_lines(path):
        try:
            problem, _ = _parse(line, columns, path.stem)
            chats += 1
            if known.setdefault(problem.id, problem) != problem:
                raise ValueError(f"id {problem.id!r} is that of another problem further up")
        except ValueError as error:
            faults.append(f"line {number}: {error}")
    if faults:
        more = "" if len(faults) <= SHOWN else f"; and {len(faults) - SHOWN} more"
        raise InputError(
            f"{path} has {len(faults)} damaged line(s), of chats like "
            f'{{"{columns.messages}": [{{"role": ..., "content": ...}}, ...]}}: '
            f"{'; '.join(faults[:SHOWN])}{more}; mend or remove them"
        )
    if not chats:
        raise InputError(f"{path} is empty; it should hold at least one chat")


def _episodes(path: Path, columns: ChatColumns) -> Iterator[Episode]:
    samples = Counter[str]()
    for _, line in numbered_lines(path):
        problem, steps = _parse(line, columns, path.stem)
        yield Episode(Transcript(problem, steps), samples[problem.id], 0)
        samples[problem.id] += 1


def _parse(line: bytes, columns: ChatColumns, stem: str) -> tuple[Problem, tuple[Step, ...]]:
    """Problem and turns. Raises ValueError, in one line, for what is no chat."""
    record = json_object(line)
    if columns.messages not in record:
        raise ValueError(f"nothing in {columns.messages!r}")
    try:
        messages = _MESSAGES.validate_python(record[columns.messages], strict=True)
    except ValidationError as errors:
        fault = errors.errors()[0]
        place = ".".join(map(str, (columns.messages, *fault["loc"])))
        raise ValueError(f"{place}: {fault['msg']}") from None
    replies = [place for place, message in enumerate(messages) if message.role == "assistant"]
    if not replies:
        raise ValueError("no message of the assistant's")
    first = replies[0]
    asked = _cell(record, columns.problem) or "\n\n".join(message.text for message in messages[:first])
    answer = _cell(record, columns.answer)
    by_content = hashlib.blake2b(f"{asked}\0{answer}".encode(), digest_size=6).hexdigest()
    problem = Problem(_cell(record, columns.id) or f"{stem}-{by_content}", asked, answer)
    return problem, tuple(_step(message) for message in messages[first:])


def _step(message: _Said) -> Step:
    sampled = message.role == "assistant"
    reply = Reply(message.text, count_words(message.text) if sampled else 0, model="imported" if sampled else "")
    return Step(message.name or message.role, message.role, reply)


def _cell(record: dict[str, object], key: str) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{key!r} holds a {type(value).__name__}; expected text or a number")
    return str(value).strip()
