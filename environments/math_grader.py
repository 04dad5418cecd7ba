r"""Grading of mathematical answers and of multiple choice."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from string import ascii_uppercase

from pebble import ProcessExpired

from turnwise.environments.answers import choice_letter, last_boxed, letter_of
from turnwise.environments.environment import Grade, Grader, Outcome
from turnwise.environments.equivalence import compare, decide, number, parses, prepare_worker, tidy
from turnwise.environments.killable_pool import KillablePool
from turnwise.environments.problem import Problem


class MathGrader(Grader):
    r"""Extracts an answer from the text and compares it with the gold answer, by math-verify where algebra is needed.

    An answer is UNPARSABLE where there is none, where it is longer than `equivalence.MAX_LENGTH`, where its braces do
    not pair up, and where math-verify cannot read the whole of it; a part that happens to be right counts for nothing.
    It has TIMED_OUT after `seconds` of a worker's CPU time, so that a busy machine changes no grade. Units, a percent
    sign and the base of a number may be left out, and decimals are equal where they are so to six places, as
    math-verify has it.

    For a problem with choices, the answer is the letter of a choice or its text.

    `extract` finds the answer in the text: `last_boxed`, or for example `functools.partial(last_marked, marker="A:")`.
    Worker processes start with the first answer that needs them; `close` ends them. What holds for scripts and threads
    is said at `KillablePool`. An answer that never comes to an end holds one worker for `seconds`; the other workers go
    on, so that the rest waits only where there are as many such answers at once as workers.
    """

    def __init__(
        self, *, workers: int = 2, seconds: float = 5.0, extract: Callable[[str], str | None] = last_boxed
    ) -> None:
        self._extract = extract
        self._pool = KillablePool(prepare_worker, workers=workers, seconds=seconds)

    async def grade(self, problem: Problem, text: str) -> Grade:
        """The grade of the answer that `extract` finds in `text`."""
        answer = self._extract(text)
        if problem.choices:
            return await self._grade_choice(problem, text, answer)
        if answer is None:
            return Grade(Outcome.UNPARSABLE)
        return Grade(await self._compare(problem.answer, answer), answer)

    def unparsable_golds(self, problems: Iterable[Problem]) -> list[str]:
        """The ids of the problems whose gold answer cannot be graded against, in order."""

        async def check() -> list[str]:
            problems_ = list(problems)
            fine = await asyncio.gather(*map(self._gold_parses, problems_))
            return [problem.id for problem, parsed in zip(problems_, fine, strict=True) if not parsed]

        with ThreadPoolExecutor(1) as thread:  # an event loop of its own: the caller may be running in one
            return thread.submit(asyncio.run, check()).result()

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    async def _grade_choice(self, problem: Problem, text: str, answer: str | None) -> Grade:
        gold = problem.choices[ascii_uppercase.index(problem.answer)]
        if answer is None:
            letter = choice_letter(text, len(problem.choices))
            return _grade_letter(problem, letter, letter) if letter else Grade(Outcome.UNPARSABLE)
        # Texts before letters: "A. thaliana" may be the text of choice C.
        for letter, choice in zip(ascii_uppercase, problem.choices, strict=False):
            if tidy(choice) == tidy(answer) and len(tidy(answer)) > 1:
                return _grade_letter(problem, letter, answer)
        letter = letter_of(answer, len(problem.choices))
        if letter:
            return _grade_letter(problem, letter, answer)
        return Grade(await self._compare(gold, answer), answer)

    async def _compare(self, gold: str, answer: str) -> Outcome:
        outcome = decide(gold, answer)
        if outcome is not None:
            return outcome
        try:
            return await self._pool.call(compare, gold, answer)
        except TimeoutError:
            return Outcome.TIMED_OUT
        except ProcessExpired:  # such as a stack overflow in C code
            return Outcome.UNPARSABLE

    async def _gold_parses(self, problem: Problem) -> bool:
        if problem.choices:
            return problem.answer in tuple(ascii_uppercase[: len(problem.choices)])
        if number(tidy(problem.answer)) is not None:
            return True
        try:
            return await self._pool.call(parses, problem.answer)
        except (TimeoutError, ProcessExpired):
            return False


def _grade_letter(problem: Problem, letter: str, answer: str) -> Grade:
    return Grade(Outcome.RIGHT if letter == problem.answer else Outcome.WRONG, answer)
