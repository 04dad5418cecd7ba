import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError
from pydantic import ValidationError

from turnwise.environments import benchmarks
from turnwise.environments.benchmarks import (
    AIME_2025,
    BENCHMARKS,
    GPQA_DIAMOND,
    GSM8K,
    MATH_500,
    MINERVA_ALGEBRA,
    Columns,
    LoadedProblems,
    load_benchmark,
    load_problems,
)
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.problem import Problem

DATA = Path(__file__).parents[3] / "shared" / "data"
ROWS: list[dict[str, object]] = [{"problem": "1+1?", "answer": 2}, {"problem": "half?", "answer": r"\frac{1}{2}"}]
PROBLEMS = (Problem("sums-0", "1+1?", "2"), Problem("sums-1", "half?", r"\frac{1}{2}"))


@pytest.fixture(scope="module", autouse=True)
def _one_grader() -> Iterator[None]:
    """The processes that read the gold answers start once, not with each file."""
    with MathGrader() as grader, pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "MathGrader", lambda: nullcontext(grader))
        yield


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_local_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"sums{suffix}"
    rows = [{**row, "answer": str(row["answer"])} for row in ROWS]
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(json.dumps(row) for row in rows))
    assert load_problems(path) == LoadedProblems(PROBLEMS)
    assert load_problems(str(path), limit=1) == LoadedProblems(PROBLEMS[:1])
    assert load_problems(path, limit=9) == LoadedProblems(PROBLEMS)


def test_a_file_name_is_no_pattern(tmp_path: Path) -> None:
    path = written(tmp_path / "sums [1]*.jsonl", ROWS)
    assert [problem.id for problem in load_problems(path).problems] == ["sums [1]*-0", "sums [1]*-1"]


def test_columns(tmp_path: Path) -> None:
    row: dict[str, object] = {"q": "1+1?", "a": 2.0, "key": "k7", "hard": "Level 5", "topic": "sums", "why": "so"}
    columns = Columns(question="q", answer="a", id="key", level="hard", subject="topic", solution="why")
    expected = Problem("sums-k7", "1+1?", "2", level=5, subject="sums", solution="so")
    assert load_problems(written(tmp_path / "sums.jsonl", [row]), columns=columns).problems == (expected,)


def test_columns_are_frozen_and_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError):
        Columns.model_validate({"answers": "a"})
    with pytest.raises(ValidationError):
        Columns().question = "q"  # type: ignore[misc]


@pytest.mark.parametrize(("level", "expected"), [(3, 3), (4.0, 4), ("Level 5", 5), ("5.0", 5), ("hard", 0), (None, 0)])
def test_levels(tmp_path: Path, level: object, expected: int) -> None:
    path = written(tmp_path / "sums.jsonl", [{"problem": "1+1?", "answer": "2", "level": level}])
    assert load_problems(path, columns=Columns(level="level")).problems[0].level == expected


def test_gsm8k_rows() -> None:
    table = [{"question": "How many?", "answer": "16-3=<<16-3=13>>13, times 2\n#### 1,026"}]
    expected = Problem("gsm8k-0", "How many?", "1,026", solution="16-3=13, times 2\n#### 1,026")
    assert from_hub(GSM8K, table) == (LoadedProblems((expected,)), ("openai/gsm8k", "main", "test"))


def test_math_rows_hold_their_answer_in_a_box() -> None:
    solution = r"Well, $\boxed{1}$ no, $\boxed{\frac{3}{4}}$."
    table = [{"problem": "p", "level": "Level 3", "type": "Algebra", "solution": solution}]
    expected = Problem("minerva-algebra-0", "p", r"\frac{3}{4}", level=3, subject="Algebra", solution=solution)
    assert from_hub(MINERVA_ALGEBRA, table)[0].problems == (expected,)


def test_gpqa_choices_are_shuffled_by_the_id_alone() -> None:
    wrong = {f"Incorrect Answer {number}": f"wrong {number}" for number in (1, 2, 3)}
    table = [
        {
            "Question": "?",
            "Correct Answer": "right",
            **wrong,
            "Record ID": f"rec{n}",
            "Subdomain": "s",
            "Explanation": "",
        }
        for n in range(40)
    ]
    problems = from_hub(GPQA_DIAMOND, table)[0].problems
    for problem in problems:
        assert sorted(problem.choices) == ["right", "wrong 1", "wrong 2", "wrong 3"]
        assert problem.choices["ABCD".index(problem.answer)] == "right"
    assert [(problem.answer, problem.choices) for problem in problems[:3]] == [
        ("A", ("right", "wrong 1", "wrong 3", "wrong 2")),
        ("A", ("right", "wrong 2", "wrong 3", "wrong 1")),
        ("D", ("wrong 2", "wrong 3", "wrong 1", "right")),
    ]
    assert {problem.answer for problem in problems} == set("ABCD")
    backwards = from_hub(GPQA_DIAMOND, table[::-1])[0].problems
    assert backwards[::-1] == problems


def test_the_hub_is_asked_for_what_the_benchmark_says() -> None:
    table = [{"problem": "p", "answer": "033", "id": "7"}]
    loaded, asked = from_hub(AIME_2025, table)
    assert asked == ("math-ai/aime25", None, "test")
    assert loaded.problems == (Problem("aime-2025-7", "p", "033"),)


def test_the_benchmarks() -> None:
    assert list(BENCHMARKS) == [
        *["math-500", "gsm8k", "aime-2024", "aime-2025", "amc-2023"],
        *["minerva-algebra", "gpqa-diamond", "math-train", "deepscaler"],
    ]


def test_a_hub_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        DatasetNotFoundError("'x' is a gated dataset"),
        ConnectionError("no route\nto host"),
        ValueError("?"),
    ):
        monkeypatch.setattr(benchmarks, "load_dataset", raising(error))
        with pytest.raises(InputError, match=r"^benchmark math-500 comes from HuggingFaceH4/MATH-500 .*source$"):
            load_benchmark(MATH_500)


def test_a_local_copy_has_the_ids_of_the_hub(tmp_path: Path) -> None:
    path = written(tmp_path / "copy.jsonl", [{"question": "How many?", "answer": "#### 3"}])
    assert [problem.id for problem in load_benchmark(GSM8K, source=path).problems] == ["gsm8k-0"]


def test_golds_that_cannot_be_parsed_are_dropped_and_named(tmp_path: Path) -> None:
    answers = ["2", "??", None, "x+1", ""]
    path = written(tmp_path / "sums.jsonl", [{"problem": "?", "answer": answer} for answer in answers])
    loaded = load_problems(path)
    assert [problem.id for problem in loaded.problems] == ["sums-0", "sums-3"]
    assert loaded.dropped == ("sums-1", "sums-2", "sums-4")
    expected = "2 problems; 3 dropped, as their gold answer cannot be parsed: sums-1, sums-2, sums-4"
    assert str(loaded) == expected
    assert str(LoadedProblems(PROBLEMS)) == "2 problems"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"problem": "?", "answer": "1"}\n{"problem": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", '\n{"problem": "?", "answer": "1"}\n\nhello\n', "a.jsonl, line 4: not JSON"),
        ("a.jsonl", "1\n2\n", "a.jsonl, line 1: a problem is a JSON object; got 1"),
        ("a.jsonl", '{"problem": "\\ud800", "answer": "1"}', "a.jsonl is no table of problems"),
        ("a.json", '[{"problem": "?"},\n{"problem": ]', "a.json, line 2: not JSON"),
        ("a.json", "[]", "a.json is empty"),
        ("a.json", "", "a.json is empty"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", "\n\n", "a.jsonl"),
        ("a.parquet", "PAR1", "a.parquet is not a Parquet file"),
        ("a.csv", "problem,answer", "ends in .jsonl, .json, .parquet; got .*a.csv"),
        (
            "a.jsonl",
            '{"question": "?", "answer": "1"}',
            "no column 'problem' for question; it has question, answer; say",
        ),
        ("a.jsonl", '{"problem": " ", "answer": "1"}', "row 0: nothing in column 'problem'"),
        ("a.jsonl", '{"problem": "?", "answer": ["1"]}', "row 0: column 'answer' holds a list"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_problems(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"problem": "\xe9", "answer": "1"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl is not in UTF-8"):
        load_problems(tmp_path / "a.jsonl")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file .*a\.jsonl"):
        load_problems(tmp_path / "a.jsonl")


def test_ids_that_are_not_unique(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"problem": "?", "answer": "1", "id": key} for key in ("x", "y", "x")])
    with pytest.raises(InputError, match=r"has 'a-x' more than once in column 'id'"):
        load_problems(path, columns=Columns(id="id"))


def test_a_choice_that_is_missing(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"problem": "?", "answer": "1", "b": None, "c": "3"}])
    with pytest.raises(InputError, match=r"row 0: nothing in column 'b'"):
        load_problems(path, columns=Columns(wrong_choices=("b", "c")))
    with pytest.raises(InputError, match=r"no column 'd' for wrong_choices"):
        load_problems(path, columns=Columns(wrong_choices=("b", "d")))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_nothing(tmp_path: Path, limit: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        load_problems(written(tmp_path / "a.jsonl", ROWS), limit=limit)
    with pytest.raises(InputError, match="at least 1"):
        load_benchmark(MATH_500, limit=limit)


def test_real_files() -> None:
    for name in ("math500_test.jsonl", "gsm8k_test.jsonl", "math_train.json"):
        if not (DATA / name).is_file():
            pytest.skip(f"../shared/data/{name} is not there")
    math_500 = load_benchmark(MATH_500, source=DATA / "math500_test.jsonl")
    assert (len(math_500.problems), math_500.dropped) == (500, ())
    assert math_500.problems[2].id == "math-500-test/algebra/2584.json"
    assert (math_500.problems[2].answer, math_500.problems[2].level) == (r"\frac{14}{3}", 3)
    gsm8k = load_benchmark(GSM8K, source=DATA / "gsm8k_test.jsonl")
    assert (len(gsm8k.problems), gsm8k.dropped, gsm8k.problems[2].answer) == (1319, (), "70000")
    columns = Columns(level="difficulty", subject="type")
    train = load_problems(DATA / "math_train.json", columns=columns, limit=1000, name="math-train")
    assert (len(train.problems), train.dropped) == (999, ("math-train-886",))
    assert (train.problems[0].level, train.problems[0].subject) == (5, "Algebra")


def from_hub(
    benchmark: benchmarks.Benchmark, table: list[dict[str, object]]
) -> tuple[LoadedProblems, tuple[str, str | None, str]]:
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(repository: str, configuration: str | None, *, split: str) -> Dataset:
        asked.append((repository, configuration, split))
        return Dataset.from_list(table)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "load_dataset", load_dataset)
        loaded = load_benchmark(benchmark)
    return loaded, asked[0]


def raising(error: Exception) -> object:
    def load_dataset(repository: str, configuration: str | None, *, split: str) -> Dataset:
        raise error

    return load_dataset
