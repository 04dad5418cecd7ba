"""Benchmarks from the Hugging Face hub, and problems from any local JSONL, JSON or Parquet file, by `datasets`."""

import glob
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from tempfile import TemporaryDirectory
from typing import Literal

from datasets import (  # type: ignore[import-untyped]
    Dataset,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
)
from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict

from turnwise.environments.answers import last_boxed, last_marked, without_annotations
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.problem import Problem

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Columns(BaseModel):
    """Which column of a table holds what; None for what the table lacks.

    `gold` says where in its column the gold answer stands: it is the whole ("plain"), follows the last "####" as in
    GSM8K ("marked"), or is the last box of a solution ("boxed").

    Where `wrong_choices` names columns, the question is a multiple choice between them and the answer's column. The
    choices are shuffled by the problem's id, so that a problem has the same letters in every run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = "problem"
    answer: str = "answer"
    id: str | None = None
    level: str | None = None
    subject: str | None = None
    solution: str | None = None
    wrong_choices: tuple[str, ...] = ()
    gold: Literal["plain", "marked", "boxed"] = "plain"


class Benchmark(BaseModel):
    """A data set on the hub: its repository, configuration and split, and what its columns hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    repository: str
    split: str
    configuration: str | None = None
    columns: Columns = Columns()


@dataclass(frozen=True, slots=True)
class LoadedProblems:
    """The problems, and the ids of those that were dropped since their gold answer cannot be parsed."""

    problems: tuple[Problem, ...]
    dropped: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.dropped:
            return f"{len(self.problems)} problems"
        dropped = f"{len(self.dropped)} dropped, as their gold answer cannot be parsed: {', '.join(self.dropped)}"
        return f"{len(self.problems)} problems; {dropped}"


MATH_500 = Benchmark(
    name="math-500",
    repository="HuggingFaceH4/MATH-500",
    split="test",
    columns=Columns(id="unique_id", level="level", subject="subject", solution="solution"),
)
GSM8K = Benchmark(
    name="gsm8k",
    repository="openai/gsm8k",
    configuration="main",
    split="test",
    columns=Columns(question="question", solution="answer", gold="marked"),
)
AIME_2024 = Benchmark(
    name="aime-2024",
    repository="HuggingFaceH4/aime_2024",
    split="train",
    columns=Columns(id="id", solution="solution"),
)
AIME_2025 = Benchmark(name="aime-2025", repository="math-ai/aime25", split="test", columns=Columns(id="id"))
AMC_2023 = Benchmark(name="amc-2023", repository="math-ai/amc23", split="test", columns=Columns(question="question"))
_MATH_COLUMNS = Columns(answer="solution", solution="solution", level="level", subject="type", gold="boxed")
MINERVA_ALGEBRA = Benchmark(
    name="minerva-algebra",
    repository="EleutherAI/hendrycks_math",
    configuration="algebra",
    split="test",
    columns=_MATH_COLUMNS,
)
GPQA_DIAMOND = Benchmark(
    name="gpqa-diamond",
    repository="Idavidrein/gpqa",
    configuration="gpqa_diamond",
    split="train",
    columns=Columns(
        question="Question",
        answer="Correct Answer",
        id="Record ID",
        subject="Subdomain",
        solution="Explanation",
        wrong_choices=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
    ),
)
MATH_TRAIN = Benchmark(
    name="math-train", repository="DigitalLearningGmbH/MATH-lighteval", split="train", columns=_MATH_COLUMNS
)
DEEPSCALER = Benchmark(
    name="deepscaler",
    repository="agentica-org/DeepScaleR-Preview-Dataset",
    split="train",
    columns=Columns(solution="solution"),
)
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        MATH_500,
        GSM8K,
        AIME_2024,
        AIME_2025,
        AMC_2023,
        MINERVA_ALGEBRA,
        GPQA_DIAMOND,
        MATH_TRAIN,
        DEEPSCALER,
    )
}
"""By name."""


def load_benchmark(
    benchmark: Benchmark, *, source: str | Path | None = None, limit: int | None = None
) -> LoadedProblems:
    """The first `limit` problems of a benchmark, from the hub, or from a local copy at `source` with the same columns.

    Raises InputError where the hub cannot be reached or refuses, and for what `load_problems` refuses.
    """
    if source is not None:
        return load_problems(source, columns=benchmark.columns, limit=limit, name=benchmark.name)
    _check_limit(limit)
    try:
        table = load_dataset(benchmark.repository, benchmark.configuration, split=benchmark.split)
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(
            f"benchmark {benchmark.name} comes from {benchmark.repository} on the hub, which gave: "
            f"{_first_line(error)}; check the network, log in where the data set asks for it (hf auth login), "
            "or pass a local copy as source"
        ) from error
    return _read(table, benchmark.columns, benchmark.name, benchmark.repository, limit)


def load_problems(
    source: str | Path, *, columns: Columns | None = None, limit: int | None = None, name: str | None = None
) -> LoadedProblems:
    """The problems in the first `limit` rows of a JSONL, JSON or Parquet file.

    A problem's id is `name` (by default the file's, without its suffix) and its id or, where `columns` names no column
    for that, the number of its row, from 0. Raises InputError where the file or a row of it cannot be used.
    """
    path = Path(source)
    _check_limit(limit)
    if path.suffix not in _FORMATS:
        raise InputError(f"problems come from a file that ends in {', '.join(_FORMATS)}; got {path}")
    if not path.is_file():
        raise InputError(f"no file {path}; pass the path of a JSONL, JSON or Parquet file with problems")
    return _read(_load_file(path), columns or Columns(), name or path.stem, str(path), limit)


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise InputError(f"a limit is at least 1 problem, or None for all; got {limit}")


def _load_file(path: Path) -> Dataset:
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; it should hold at least one problem")
    # In memory, with a cache that goes away: the cache of `datasets` is for what was downloaded.
    with TemporaryDirectory() as cache, quiet_datasets():
        try:
            return load_dataset(
                _FORMATS[path.suffix],
                data_files=glob.escape(str(path)),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
            )
        except Exception as error:  # what `datasets` raises for a bad file depends on where it notices
            raise InputError(_explain(path, error)) from error


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without what `datasets` prints while it reads or writes a file: where it fails, our error says it in one line."""
    logger = logging.getLogger("datasets")
    level, hidden = logger.level, are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not hidden:
            enable_progress_bars()


def _explain(path: Path, error: Exception) -> str:
    """What is wrong with a file that `datasets` cannot load."""
    if path.suffix == ".parquet":
        return f"{path} is not a Parquet file that can be read: {_first_line(error)}"
    text = path.read_bytes().decode(errors="replace")
    pieces = text.splitlines() if path.suffix == ".jsonl" else [text]
    for number, piece in enumerate(pieces, 1):
        try:
            value = json.loads(piece) if piece.strip() else {}
        except json.JSONDecodeError as mistake:
            line = number if path.suffix == ".jsonl" else mistake.lineno
            return f"{path}, line {line}: not JSON ({mistake.msg}, column {mistake.colno}); mend or remove it"
        if value == []:
            return f"{path} is empty; it should hold at least one problem"
        if not isinstance(value, dict | list):
            return f"{path}, line {number}: a problem is a JSON object; got {piece[:40]}"
    return f"{path} is no table of problems, one JSON object each: {_first_line(error.__cause__ or error)}"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _read(table: Dataset, columns: Columns, name: str, source: str, limit: int | None) -> LoadedProblems:
    for column, field in _named(columns).items():
        if column not in table.column_names:
            there = ", ".join(table.column_names)
            raise InputError(
                f"{source} has no column {column!r} for {field}; it has {there}; say which in Columns({field}=...)"
            )
    rows = table if limit is None else table.select(range(min(limit, len(table))))
    try:
        cells = [_cells(row, columns, f"{source}, row {index}") for index, row in enumerate(rows)]
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not in UTF-8: {error.reason}; save it in that encoding") from error
    if not cells:
        raise InputError(f"{source} is empty; it should hold at least one problem")
    problems = [_problem(texts, columns, name, index) for index, texts in enumerate(cells)]
    _check_ids(problems, columns, source)
    with MathGrader() as grader:
        dropped = grader.unparsable_golds(problems)
    gone = set(dropped)
    return LoadedProblems(tuple(problem for problem in problems if problem.id not in gone), tuple(dropped))


def _named(columns: Columns) -> dict[str, str]:
    """The columns that are named, each with a field that names it."""
    fields = ("question", "answer", "id", "level", "subject", "solution")
    named = {getattr(columns, field): field for field in fields if getattr(columns, field)}
    return named | dict.fromkeys(columns.wrong_choices, "wrong_choices")


def _check_ids(problems: Iterable[Problem], columns: Columns, source: str) -> None:
    seen = set[str]()
    for problem in problems:
        if problem.id in seen:
            raise InputError(
                f"ids are unique, but {source} has {problem.id!r} more than once in column {columns.id!r}; "
                "mend it, or leave Columns(id=None) to number the rows"
            )
        seen.add(problem.id)


def _cells(row: Mapping[str, object], columns: Columns, place: str) -> dict[str, str]:
    """The text in each named column of a row. Which gold answers are missing is found out later, all at once."""
    texts = {}
    for column, field in _named(columns).items():
        value = row[column]
        if isinstance(value, list | dict):
            raise InputError(f"{place}: column {column!r} holds a {type(value).__name__}; expected text or a number")
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a column of whole numbers with a gap in it is read as one of floats
        texts[column] = "" if value is None else str(value).strip()
        needed = field in ("question", "id", "wrong_choices") or (field == "answer" and columns.wrong_choices)
        if needed and not texts[column]:
            raise InputError(f"{place}: nothing in column {column!r}, the {field}; mend or remove the row")
    return texts


def _problem(texts: Mapping[str, str], columns: Columns, name: str, index: int) -> Problem:
    id_ = f"{name}-{texts[columns.id] if columns.id else index}"
    answer, solution = _gold(texts[columns.answer], columns.gold), texts.get(columns.solution or "", "")
    choices: tuple[str, ...] = ()
    if columns.wrong_choices:
        answer, choices = _shuffled(id_, [answer, *(texts[column] for column in columns.wrong_choices)])
    return Problem(
        id=id_,
        question=texts[columns.question],
        answer=answer,
        level=_level(texts.get(columns.level or "", "")),
        subject=texts.get(columns.subject or "", ""),
        solution=without_annotations(solution) if columns.gold == "marked" else solution,
        choices=choices,
    )


def _shuffled(id_: str, choices: list[str]) -> tuple[str, tuple[str, ...]]:
    """The letter of the first of `choices` after they were shuffled, and all of them in their new order."""
    order = list(range(len(choices)))
    random.Random(f"choices of {id_}").shuffle(order)
    return ascii_uppercase[order.index(0)], tuple(choices[index] for index in order)


def _gold(text: str, gold: str) -> str:
    if gold == "marked":
        return last_marked(text) or ""
    if gold == "boxed":
        return last_boxed(text) or ""
    return text


def _level(text: str) -> int:
    """The number in "5", "5.0" or "Level 5", rounded; 0 where there is none."""
    match = re.search(r"[0-9]+(?:\.[0-9]+)?", text)
    return round(float(match[0])) if match else 0
