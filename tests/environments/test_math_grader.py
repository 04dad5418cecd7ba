import asyncio
import json
import os
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from turnwise.environments.answers import last_boxed, last_marked
from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.problem import Problem

DATA = Path(__file__).parents[3] / "shared" / "data"
SECONDS = 0.5  # of CPU time, on which no machine is done with the hostile ones
TOWER = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    with MathGrader(workers=2, seconds=600) as grader:
        yield grader


def problem(answer: str, *choices: str) -> Problem:
    return Problem(id="p", question="?", answer=answer, choices=choices)


def grade(grader: MathGrader, problem: Problem, text: str) -> Grade:
    return asyncio.run(grader.grade(problem, text))


@pytest.mark.parametrize(
    ("gold", "text", "expected"),
    [
        ("18", r"so \boxed{18}", Grade(Outcome.RIGHT, "18")),
        (r"\frac{1}{2}", r"\boxed{0.5}", Grade(Outcome.RIGHT, "0.5")),
        ("3", r"\boxed{\frac{3}{4}}", Grade(Outcome.WRONG, r"\frac{3}{4}")),
        ("18", r"\boxed{17}", Grade(Outcome.WRONG, "17")),
        ("18", r"\boxed{}", Grade(Outcome.UNPARSABLE, "")),
        ("18", r"\boxed{((}", Grade(Outcome.UNPARSABLE, "((")),
        ("18", r"\boxed{18", Grade(Outcome.UNPARSABLE, None)),
        ("18", "18", Grade(Outcome.UNPARSABLE, None)),
        ("18", "", Grade(Outcome.UNPARSABLE, None)),
    ],
)
def test_grades(grader: MathGrader, gold: str, text: str, expected: Grade) -> None:
    assert grade(grader, problem(gold), text) == expected


UNPARSABLE, TIMED_OUT, EITHER = {Outcome.UNPARSABLE}, {Outcome.TIMED_OUT}, {Outcome.UNPARSABLE, Outcome.TIMED_OUT}
HOSTILE = [
    (TOWER, TIMED_OUT),
    (r"\boxed{10000000000!}", TIMED_OUT),
    (r"\boxed{(x+y+z)^{10000}}", TIMED_OUT),
    (r"\boxed{\sin(10^{10^{10}})}", TIMED_OUT),
    ("\\boxed{" + "9" * 200_000 + "}", UNPARSABLE),
    ("\\boxed{" * 25_000, UNPARSABLE),
    ("{" * 200_000 + "\\boxed{5}" + "}" * 100_000 + "\\boxed{?}", UNPARSABLE),
    ("\\boxed{" + "{" * 900 + "5" + "}" * 900 + "}", EITHER),
    ("\\boxed{" + "(" * 900 + "5" + ")" * 900 + "}", EITHER),
    ("\\boxed{" + r"\frac{1}{" * 200 + "5" + "}" * 200 + "}", UNPARSABLE),
    ("\\boxed{" + r"\begin{pmatrix}" * 100 + "}", UNPARSABLE),
    ("\\boxed{" + "5\\%" * 600 + "}", {Outcome.WRONG}),
    ("\\boxed{" + "$" * 1999 + "}", UNPARSABLE),
    ("\\boxed{5\0}", UNPARSABLE),
    ("\\boxed{5\ud800}", UNPARSABLE),
    ("\ud800\\boxed{((}}}}{{{", UNPARSABLE),
    ("\\boxed{__import__('os').getpid()}", UNPARSABLE),
]


def test_hostile_answers_are_told_from_others() -> None:
    async def play(text: str, outcomes: set[Outcome]) -> list[Grade]:
        grader._pool._seconds = SECONDS if Outcome.TIMED_OUT in outcomes else 600
        hostile = asyncio.create_task(grader.grade(problem("4"), text))
        await asyncio.sleep(0)  # it has its limit
        grader._pool._seconds = 600
        others = (grader.grade(problem("2x"), rf"\boxed{{x+x+{number}-{number}}}") for number in range(20))
        return await asyncio.gather(hostile, *others)

    with MathGrader(workers=2) as grader:
        for text, outcomes in HOSTILE:
            hostile, *others = asyncio.run(play(text, outcomes))
            assert hostile.outcome in outcomes, text[:50]
            assert hostile.answer == last_boxed(text), text[:50]
            assert {other.outcome for other in others} == {Outcome.RIGHT}, text[:50]


def test_others_are_graded_while_one_is_stuck(grader: MathGrader, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    async def play() -> list[Grade]:
        stuck = asyncio.create_task(grader._pool.call(Path.read_bytes, tmp_path / "fifo"))
        with await asyncio.to_thread((tmp_path / "fifo").open, "wb"):
            texts = [rf"\boxed{{\frac{{{number}}}{{7}}}}" for number in range(60)]
            others = await asyncio.gather(*(grader.grade(problem(r"\frac{3}{7}"), text) for text in texts))
            assert not stuck.done()
        assert await stuck == b""
        return others

    assert [other.right for other in asyncio.run(play())] == [number == 3 for number in range(60)]


def test_a_cancelled_grade_leaves_the_grader_usable() -> None:
    async def play() -> Grade:
        task = asyncio.create_task(grader.grade(problem("1"), TOWER))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        grader._pool._seconds = 600
        return await grader.grade(problem("2x"), r"\boxed{x+x}")

    with MathGrader(workers=1, seconds=SECONDS) as grader:
        assert asyncio.run(play()) == Grade(Outcome.RIGHT, "x+x")


def test_another_extraction() -> None:
    with MathGrader(extract=partial(last_marked, marker="A:")) as marked:
        assert grade(marked, problem("26"), "13 * 2 = <<13*2=26>>26\nA: 26") == Grade(Outcome.RIGHT, "26")
        assert grade(marked, problem("26"), "A: \\boxed{26}") == Grade(Outcome.RIGHT, "\\boxed{26}")
        assert grade(marked, problem("26"), r"\boxed{26}") == Grade(Outcome.UNPARSABLE)


CHOICES = ("10 cm", r"\frac{1}{2}", "A. thaliana", "a, b and c")


@pytest.mark.parametrize(
    ("text", "outcome", "answer"),
    [
        (r"\boxed{B}", Outcome.RIGHT, "B"),
        (r"\boxed{\text{(B)}}", Outcome.RIGHT, r"\text{(B)}"),
        (r"\boxed{B. \frac{1}{2}}", Outcome.RIGHT, r"B. \frac{1}{2}"),
        (r"\boxed{\frac{1}{2}}", Outcome.RIGHT, r"\frac{1}{2}"),
        (r"\boxed{0.5}", Outcome.RIGHT, "0.5"),
        ("Answer: B", Outcome.RIGHT, "B"),
        (r"\boxed{A}", Outcome.WRONG, "A"),
        (r"\boxed{A. thaliana}", Outcome.WRONG, "A. thaliana"),
        (r"\boxed{0.6}", Outcome.WRONG, "0.6"),
        ("Answer: B\n\\boxed{C}", Outcome.WRONG, "C"),
        ("no idea", Outcome.UNPARSABLE, None),
    ],
)
def test_multiple_choice(grader: MathGrader, text: str, outcome: Outcome, answer: str | None) -> None:
    assert grade(grader, problem("B", *CHOICES), text) == Grade(outcome, answer)


def test_a_boxed_choice_is_its_text_before_it_is_a_letter(grader: MathGrader) -> None:
    assert grade(grader, problem("C", *CHOICES), r"\boxed{A. thaliana}").right
    assert grade(grader, problem("D", *CHOICES), r"\boxed{a, b and c}").right


def test_golds_that_cannot_be_graded_against(grader: MathGrader) -> None:
    golds = ["5", "??", r"\frac{x}{2}", "", "9^{9^{9}}", "{"]
    problems = [Problem(id=f"p{index}", question="?", answer=gold) for index, gold in enumerate(golds)]
    problems += [Problem("letter", "?", "B", choices=CHOICES), Problem("no letter", "?", "E", choices=CHOICES)]
    assert grader.unparsable_golds(problems) == ["p1", "p3", "p5", "no letter"]


def test_golds_are_checked_within_a_running_event_loop(grader: MathGrader) -> None:
    async def play() -> list[str]:
        return grader.unparsable_golds([problem("??")])

    assert asyncio.run(play()) == ["p"]


def lines(name: str) -> list[str]:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"../shared/data/{name} is not there")
    return path.read_text().splitlines()


def test_gsm8k_model_solutions_are_graded_as_published() -> None:
    graded, expected = [], []

    async def play() -> None:
        with MathGrader(extract=partial(last_marked, marker="A:")) as grader:
            for line in lines("gsm8k_model_solutions.jsonl"):
                item = json.loads(line)
                gold = problem(last_marked(item["ground_truth"], "A:") or "")
                for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
                    graded.append((await grader.grade(gold, item[model]["solution"])).right)
                    expected.append(item[model]["is_correct"])

    asyncio.run(play())
    assert len(graded) == 5276
    assert sum(expected) == 2001
    assert graded == expected


def test_math_500_reference_solutions_are_right(grader: MathGrader) -> None:
    async def play() -> list[Grade]:
        items = [json.loads(line) for line in lines("math500_test.jsonl")]
        return await asyncio.gather(*(grader.grade(problem(item["answer"]), item["solution"]) for item in items))

    grades = asyncio.run(play())
    assert len(grades) == 500
    assert all(grade.right for grade in grades)


def test_no_answer_of_math_500_passes_for_the_next(grader: MathGrader) -> None:
    pairs = list(pairwise(sorted({json.loads(line)["answer"] for line in lines("math500_test.jsonl")})))

    async def play() -> list[Grade]:
        return await asyncio.gather(*(grader.grade(problem(a), f"\\boxed{{{b}}}") for a, b in pairs))

    right = [pair for pair, grade in zip(pairs, asyncio.run(play()), strict=True) if grade.right]
    assert right == [("120", r"120^\circ"), ("15", r"15\mbox{ cm}^2"), ("30", r"30^\circ"), ("36", r"36^\circ")]
