"""Answers that models gave elsewhere, read from a file of JSON lines, as agents that give them again."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from turnwise.agents.scripted import ScriptedAgent
from turnwise.environments.errors import InputError
from turnwise.environments.json_lines import json_object, numbered_lines
from turnwise.environments.problem import Problem
from turnwise.environments.seeds import turn_seed
from turnwise.environments.transcript import Reply, Turn

Answers = Mapping[str, Sequence[str]]
"""What one model answered to each problem, by the problem's id: one text a sample."""


def count_words(text: str) -> int:
    """How many words a text has, between white space."""
    return len(text.split())


def read_answers(path: str | Path, problems: Sequence[Problem]) -> dict[str, Answers]:
    """What each model in a file answered to each of the problems.

    A line says which problem it answers by its "id", or by its wording under "question" or "problem". It holds one
    answer under "solution", with its "model" beside it (by default the file's name), or the answers of several models,
    {MODEL: {"solution": ...}}. Several lines on one problem are several samples. Lines on other problems are left out.

    Raises InputError for a file or a line that cannot be used, and for a model that leaves out one of the problems.
    """
    known = {key: problem.id for problem in problems for key in (problem.id, problem.question.strip())}
    found = defaultdict[str, dict[str, list[str]]](lambda: defaultdict(list))
    for number, row in _rows(Path(path)):
        named = next((str(row[key]).strip() for key in ("id", "question", "problem") if key in row), None)
        answers = dict(_answers(row, Path(path).stem))
        if named is None or not answers:
            raise InputError(
                f'line {number} of {path} needs an "id" or a "question", and a "solution" or {{MODEL: {{"solution": '
                f"...}}}}; it has {', '.join(row) or 'nothing'}"
            )
        if named in known:
            for model, text in answers.items():
                found[model][known[named]].append(text)
    if not found:
        raise InputError(
            f"{path} answers none of the problems; its questions must be worded as theirs, or have their ids"
        )
    for model, answered in found.items():
        if missing := [problem.id for problem in problems if problem.id not in answered]:
            raise InputError(f"{path}: {model} leaves {len(missing)} problems without a solution, such as {missing[0]}")
    return dict(found)


def answering(
    answers: Answers, model: str, *, seed: int = 0, count_tokens: Callable[[str], int] = count_words
) -> ScriptedAgent:
    """An agent that answers the first turn on each problem as stored: sample 0 by the first text, and so on.

    `seed` is that of the run. A reply's tokens are what `count_tokens` makes of its text.
    """
    texts = {turn_seed(seed, id_, sample, 0): text for id_, said in answers.items() for sample, text in enumerate(said)}

    def reply(turn: Turn, seed: int) -> Reply:
        if seed not in texts:
            raise InputError(
                f"{model} has no stored solution for this turn of seat {turn.seat!r}: ask for fewer samples"
            )
        return Reply(texts[seed], count_tokens(texts[seed]), model=model)

    return ScriptedAgent(reply)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        for number, line in numbered_lines(path):
            try:
                row = json_object(line)
            except ValueError as error:
                raise InputError(f"line {number} of {path} must be a JSON object; it is {error}: mend it") from None
            yield number, row
    except OSError as error:
        raise InputError(f"cannot read solutions from {path}: {error.strerror}") from None


def _answers(row: Mapping[str, object], default: str) -> Iterator[tuple[str, str]]:
    if isinstance(text := row.get("solution"), str):
        yield str(row.get("model", default)), text
    for key, value in row.items():
        if isinstance(value, dict) and isinstance(text := value.get("solution"), str):
            yield key, text
