"""Problems, and the judge of their answers."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from turnwise.environments.problem import Problem


class Outcome(StrEnum):
    """What grading found. Only `RIGHT` is right; the other three are kept apart because their remedies differ."""

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    TIMED_OUT = "timed out"


@dataclass(frozen=True, slots=True)
class Grade:
    """The outcome, and the answer as it was extracted from the text (None: the text held no answer)."""

    outcome: Outcome
    answer: str | None = None

    @property
    def right(self) -> bool:
        """Whether the answer is right."""
        return self.outcome is Outcome.RIGHT


class Grader(ABC):
    """Judges the text that a protocol hands in as its answer."""

    @abstractmethod
    async def grade(self, problem: Problem, text: str) -> Grade:
        """The grade of `text` as an answer to `problem`. Never raises for any text, however malformed."""

    def close(self) -> None:  # noqa: B027 - most graders hold nothing
        """Release what the grader holds, such as worker processes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Environment:
    """A named set of problems and the grader of their answers. It knows nothing of seats, turns or models."""

    name: str
    problems: Sequence[Problem]
    grader: Grader

    @property
    def fingerprint(self) -> str:
        """Equal for two environments with the same name and the same problems in the same order."""
        digest = hashlib.blake2b("\n".join(problem.id for problem in self.problems).encode(), digest_size=8)
        return f"{self.name} {digest.hexdigest()}"
