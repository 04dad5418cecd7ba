"""How well and how fast `MathGrader` grades real answers.

    python benchmarks/grading.py FOLDER [--workers 2]

FOLDER holds `gsm8k_model_solutions.jsonl` (four model solutions for each question of GSM8K's test set, each with the
publisher's `is_correct`; from OpenAI's grade-school-math repository) and `math500_test.jsonl` (MATH-500). Every model
solution is graded and held against `is_correct`, and the boxed answer of every reference solution of MATH-500 against
`answer`; the figures are followed by every disagreement. All is done twice: as it is, and with every answer sent to
math-verify, that is, without the shortcuts that settle plain numbers and identical answers at once.
"""

import argparse
import asyncio
import json
import time
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import patch

from turnwise.environments.answers import last_boxed, last_marked
from turnwise.environments.environment import Grade
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.problem import Problem

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
Case = tuple[Problem, str, bool]  # a problem, a text to grade, and whether it is right


def gsm8k_cases(folder: Path) -> list[Case]:
    cases = []
    for index, line in enumerate((folder / "gsm8k_model_solutions.jsonl").read_text().splitlines()):
        item = json.loads(line)
        gold = last_marked(item["ground_truth"], "A:")
        for model in MODELS:
            problem = Problem(f"{index} {model}", item["question"], gold or "")
            cases.append((problem, item[model]["solution"], item[model]["is_correct"]))
    return cases


def math500_cases(folder: Path) -> list[Case]:
    lines = (folder / "math500_test.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    return [(Problem(item["unique_id"], item["problem"], item["answer"]), item["solution"], True) for item in items]


async def grade_all(grader: MathGrader, cases: list[Case]) -> list[Grade]:
    return await asyncio.gather(*(grader.grade(problem, text) for problem, text, _ in cases))


def measure(name: str, cases: list[Case], grader: MathGrader) -> None:
    warm_up = Problem("warm-up", "", r"\frac{1}{2}")
    asyncio.run(grade_all(grader, [(warm_up, "\\boxed{0.5}\nA: 0.5", True)] * 4))  # the workers are there
    start = time.perf_counter()
    grades = asyncio.run(grade_all(grader, cases))
    seconds = time.perf_counter() - start
    differing = [(case, grade) for case, grade in zip(cases, grades, strict=True) if grade.right is not case[2]]
    print(f"\n{name}: {len(cases)} answers, {len(cases) / seconds:.0f} a second, {seconds:.1f} s")
    print(
        f"  agreement {1 - len(differing) / len(cases):.4%}; {dict(Counter(grade.outcome.value for grade in grades))}"
    )
    for (problem, text, right), grade in differing:
        print(f"  {problem.id}: gold {problem.answer!r}, answer {grade.answer!r}, {grade.outcome}, published {right}")
        print(f"    ...{text[-120:]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    sets = {"GSM8K": (gsm8k_cases, partial(last_marked, marker="A:")), "MATH-500": (math500_cases, last_boxed)}
    for name, (read, extract) in sets.items():
        cases = read(arguments.folder)
        with MathGrader(workers=arguments.workers, extract=extract) as grader:
            measure(name, cases, grader)
        with (
            MathGrader(workers=arguments.workers, extract=extract) as grader,
            patch("turnwise.environments.math_grader.decide", return_value=None),
        ):
            measure(f"{name}, without shortcuts", cases, grader)


main()
