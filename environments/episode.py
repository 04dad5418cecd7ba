"""One problem, played once, with its grade."""

from dataclasses import dataclass

from turnwise.environments.environment import Grade
from turnwise.environments.transcript import Transcript


@dataclass(frozen=True, slots=True)
class Episode:
    """A finished dialogue: the `sample`-th (from 0) on its problem in the run whose seed is `seed`.

    An episode that an exception ended carries it in `error` and has no grade: it is reported, and never rewarded. One
    that was imported and has no gold answer has neither.
    """

    transcript: Transcript
    sample: int
    seed: int
    grade: Grade | None = None
    error: str | None = None

    @property
    def id(self) -> str:
        """Unique within a run: the problem's id and the number of the sample."""
        return f"{self.transcript.problem.id}#{self.sample}"

    @property
    def right(self) -> bool:
        """Whether the episode ended in a right answer."""
        return self.grade is not None and self.grade.right
