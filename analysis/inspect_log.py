"""Episodes as a log of Inspect's (inspect_ai, EvalLog version 2), for `inspect view` and what else reads such logs.

A sample is an episode: its epoch is the number of the sample, from 1; its messages are the problem and then the turns;
each turn is also a model call, whose role is the seat. Inspect need not be installed.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import orjson

from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Step
from turnwise.rl.episode_store import read_episodes
from turnwise.rl.run_folder import Run, read_run, write_whole

Json = Mapping[str, object]
SCORE = "answer"
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
    latest = {episode.id: line for line, episode in enumerate(read_episodes(store))}
    if not latest:
        raise InputError(f"{folder} holds no episodes; a log needs at least one")

    def episodes() -> Iterator[Episode]:
        return (episode for line, episode in enumerate(read_episodes(store)) if latest[episode.id] == line)

    header = _header(folder.resolve().name, run, episodes(), created)

    def write(draft: Path) -> None:
        with draft.open("wb") as file:
            # By hand, so that the samples need not be in memory together.
            file.write(orjson.dumps(header)[:-1] + b',"samples":[')
            for number, episode in enumerate(episodes()):
                file.write((b",\n" if number else b"\n") + orjson.dumps(_sample(episode, created)))
            file.write(b"\n]}\n")

    write_whole(path, write)
    return len(latest)


def _header(name: str, run: Run, episodes: Iterable[Episode], created: str) -> Json:
    problems, models = dict[str, None](), dict[str, str]()
    outcomes, usage, roles = Counter[str](), Counter[str](), Counter[str]()
    tokens = epochs = 0
    for episode in episodes:
        problems[episode.transcript.problem.id] = None
        epochs = max(epochs, episode.sample + 1)
        outcomes["error" if episode.error else "right" if episode.right else "graded" if episode.grade else "none"] += 1
        tokens += episode.transcript.token_count if episode.grade else 0
        for step in episode.transcript.steps:
            models[step.seat] = _model(step)
            usage[_model(step)] += step.reply.token_count
            roles[step.seat] += step.reply.token_count
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
            "model": next(iter(usage)) if len(usage) == 1 else f"turnwise/{protocol}",
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
            "model_usage": _usages(usage), "role_usage": _usages(roles),
        },
    }  # fmt: skip


def _sample(episode: Episode, created: str) -> Json:
    problem, steps = episode.transcript.problem, episode.transcript.steps
    turns = [_message(episode, place, step) for place, step in enumerate(steps)]
    usage, roles = Counter[str](), Counter[str]()
    for step in steps:
        usage[_model(step)] += step.reply.token_count
        roles[step.seat] += step.reply.token_count
    sample: dict[str, object] = {
        "id": problem.id, "epoch": episode.sample + 1, "uuid": episode.id, "input": problem.question,
        "target": problem.answer, "choices": list(problem.choices) or None,
        "messages": [{"id": f"{episode.id}/problem", "role": "user", "content": problem.statement}, *turns],
        "output": _output(steps[-1], turns[-1]) if steps else {"model": "", "choices": []},
        "events": [
            {
                "event": "model", "uuid": f"{message['id']}/call", "timestamp": created, "working_start": 0.0,
                "model": _model(step), "role": step.seat, "input": [], "tools": [], "tool_choice": "none",
                "config": {}, "output": _output(step, message), "metadata": message["metadata"],
            }
            for step, message in zip(steps, turns, strict=True)
        ],
        "metadata": {
            "seed": episode.seed, "level": problem.level, "subject": problem.subject, "solution": problem.solution,
        },
        "model_usage": _usages(usage),
        "role_usage": _usages(roles),
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
    return {
        "id": f"{episode.id}/{place}", "role": "assistant", "content": step.text, "source": "generate",
        "model": _model(step),
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
        "usage": _usage(reply.token_count),
    }


def _model(step: Step) -> str:
    """A log needs a name for whoever spoke."""
    return step.reply.model or "unnamed"


def _usages(tokens: Mapping[str, int]) -> Json:
    return {name: _usage(count) for name, count in tokens.items()}


def _usage(tokens: int) -> Json:
    return {"input_tokens": 0, "output_tokens": tokens, "total_tokens": tokens}
