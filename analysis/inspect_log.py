"""Episodes as a log of Inspect's (inspect_ai, EvalLog version 2), for `inspect view` and what else reads such logs.

A sample is an episode: its epoch is the number of the sample, from 1; its messages are the problem and then the turns;
each turn is also a model call, whose role is the seat. What users and tools said in an imported chat is theirs, and no
call. Inspect need not be installed.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import orjson

from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Step
from turnwise.rl.episode_store import latest_lines, read_latest
from turnwise.rl.run_folder import Run, read_run, write_whole

Json = Mapping[str, object]
SCORE = "answer"
_OTHERS = ("system", "user", "tool")
_STOP_REASONS = {"stop": "stop", "end": "stop", "length": "max_tokens"}


def export_inspect(folder: str | Path, path: str | Path) -> int:
    """Writes the episodes of a store's folder to a log, whole or not at all, and returns how many there are.

    The log's time is that at which the store was last written. Raises InputError for a damaged or an empty store, and
    for a name that does not end in .json, by which Inspect knows the format.
    """
    folder, path = Path(folder), Path(path)
    if path.suffix != ".json":
        raise InputError(f"the name of a log of Inspect's ends in .json; got {path}")
    run, store = read_run(folder), folder / "episodes.jsonl"
    if not store.is_file():
        raise InputError(f"{folder} has no episodes.jsonl; give the folder of an episode store")
    created = datetime.fromtimestamp(store.stat().st_mtime, UTC).isoformat(timespec="seconds")
    if not (number := len(latest_lines(store))):
        raise InputError(f"{folder} holds no episodes; a log needs at least one")
    header = _header(folder.resolve().name, run, read_latest(store), created)

    def write(draft: Path) -> None:
        with draft.open("wb") as file:
            # By hand, so that the samples need not be in memory together.
            file.write(orjson.dumps(header)[:-1] + b',"samples":[')
            for place, episode in enumerate(read_latest(store)):
                file.write((b",\n" if place else b"\n") + orjson.dumps(_sample(episode, created)))
            file.write(b"\n]}\n")

    write_whole(path, write)
    return number


def _header(name: str, run: Run, episodes: Iterable[Episode], created: str) -> Json:
    problems, models = dict[str, None](), dict[str, str]()
    outcomes, usage, roles = Counter[str](), _Usage(), _Usage()
    tokens = epochs = 0
    for episode in episodes:
        problems[episode.transcript.problem.id] = None
        epochs = max(epochs, episode.sample + 1)
        outcomes["error" if episode.error else "right" if episode.right else "graded" if episode.grade else "none"] += 1
        tokens += episode.transcript.token_count if episode.grade else 0
        models |= {step.seat: _model(step) for step in episode.transcript.steps if _sampled(step)}
        usage.add(episode, _model)
        roles.add(episode, lambda step: step.seat)
    scored = outcomes["right"] + outcomes["graded"]
    protocol = str(run.get("protocol", "unknown"))
    figures = {"accuracy": outcomes["right"] / scored, "tokens": tokens / scored} if scored else {}
    digest = hashlib.blake2b(orjson.dumps([name, run, created]), digest_size=11).hexdigest()
    score = {
        "name": SCORE, "scorer": SCORE, "scored_samples": scored, "unscored_samples": outcomes.total() - scored,
        "metrics": {name: {"name": name, "value": value} for name, value in figures.items()},
    }  # fmt: skip
    return {
        "version": 2,
        "status": "success",
        "eval": {
            "eval_id": digest, "run_id": digest, "task_id": digest, "created": created, "task": name,
            "dataset": {"name": str(run.get("problems", name)), "samples": len(problems), "sample_ids": list(problems)},
            "model": next(iter(usage.told)) if len(usage.told) == 1 else f"turnwise/{protocol}",
            "model_roles": {seat: {"model": model} for seat, model in models.items()},
            "config": {"epochs": max(1, epochs)},
            "metadata": dict(run),
        },
        "plan": {"name": "plan", "steps": [{"solver": protocol, "params": {}}]},
        "results": {
            "total_samples": outcomes.total(), "completed_samples": outcomes.total() - outcomes["error"],
            "scores": [score],
        },
        "stats": {
            "started_at": created, "completed_at": created,
            "model_usage": usage.told, "role_usage": roles.told,
        },
    }  # fmt: skip


def _sample(episode: Episode, created: str) -> Json:
    problem, steps = episode.transcript.problem, episode.transcript.steps
    turns = [_message(episode, place, step) for place, step in enumerate(steps)]
    usage, roles = _Usage(), _Usage()
    usage.add(episode, _model)
    roles.add(episode, lambda step: step.seat)
    calls = [(step, message) for step, message in zip(steps, turns, strict=True) if _sampled(step)]
    sample: dict[str, object] = {
        "id": problem.id, "epoch": episode.sample + 1, "uuid": episode.id, "input": problem.question,
        "target": problem.answer, "choices": list(problem.choices) or None,
        "messages": [{"id": f"{episode.id}/problem", "role": "user", "content": problem.statement}, *turns],
        "output": _output(*calls[-1]) if calls else {"model": "", "choices": []},
        "events": [
            {
                "event": "model", "uuid": f"{message['id']}/call", "timestamp": created, "working_start": 0.0,
                "model": _model(step), "role": step.seat, "input": [], "tools": [], "tool_choice": "none",
                "config": {}, "output": _output(step, message), "metadata": message["metadata"],
            }
            for step, message in calls
        ],
        "metadata": {
            "seed": episode.seed, "level": problem.level, "subject": problem.subject, "solution": problem.solution,
        },
        "model_usage": usage.told,
        "role_usage": roles.told,
    }  # fmt: skip
    if episode.grade is not None:
        grade = episode.grade
        metadata = {"outcome": str(grade.outcome)}
        sample["scores"] = {SCORE: {"value": "C" if grade.right else "I", "answer": grade.answer, "metadata": metadata}}
    if episode.error is not None:
        sample["error"] = {"message": episode.error, "traceback": "", "traceback_ansi": ""}
    return sample


def _message(episode: Episode, place: int, step: Step) -> Json:
    reply = step.reply
    said_by: dict[str, object] = {"role": step.state}
    if _sampled(step):
        said_by = {"role": "assistant", "source": "generate", "model": _model(step)}
    return {
        "id": f"{episode.id}/{place}", "content": step.text, **said_by,
        "metadata": {
            "seat": step.seat, "state": step.state, "prefill": step.prefill, "tokens": reply.token_count,
            "finish": reply.finish, "stop": reply.stop, "version": reply.version,
        },
    }  # fmt: skip


def _output(step: Step, message: Json) -> Json:
    reply = step.reply
    return {
        "model": _model(step),
        "choices": [{"message": message, "stop_reason": _STOP_REASONS[reply.finish]}],
        "usage": _usage(len(reply.prompt_token_ids), reply.token_count),
    }


def _model(step: Step) -> str:
    """A log needs a name for whoever spoke."""
    return step.reply.model or "unnamed"


def _sampled(step: Step) -> bool:
    """Whether an agent said it, and no user or tool of an imported chat."""
    return step.state not in _OTHERS or bool(step.reply.model)


class _Usage:
    """Tokens read and sampled, by model or by seat. What was read is 0 where the ids are not known."""

    def __init__(self) -> None:
        self._read, self._sampled = Counter[str](), Counter[str]()

    def add(self, episode: Episode, name: Callable[[Step], str]) -> None:
        for step in filter(_sampled, episode.transcript.steps):
            self._read[name(step)] += len(step.reply.prompt_token_ids)
            self._sampled[name(step)] += step.reply.token_count

    @property
    def told(self) -> Json:
        return {name: _usage(self._read[name], sampled) for name, sampled in self._sampled.items()}


def _usage(read: int, sampled: int) -> Json:
    return {"input_tokens": read, "output_tokens": sampled, "total_tokens": read + sampled}
