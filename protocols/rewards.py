"""Rewards: named terms, their weighted sum, and the rule that a right answer is never paid below a wrong one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum, isfinite
from typing import ClassVar, Literal

from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Step, Transcript

SHORT = "<short>"
THINK = "<think>"


@dataclass(frozen=True, slots=True)
class Reward:
    """What one seat is paid for one episode: the weighted terms by name. They sum to the total."""

    terms: Mapping[str, float]

    @property
    def total(self) -> float:
        """The sum of the terms."""
        return fsum(self.terms.values())


class Term(ABC):
    """One reason to be paid: a pure function of a group, which is all episodes sampled on one problem.

    `name` is how the term is logged. It is unique within a sum; `Weighted` can rename it.
    """

    __slots__ = ()
    name: ClassVar[str]

    @abstractmethod
    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        """What `seat` earns in each episode of `group`, in order and unweighted. The sum has checked the group."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A number that changes with the training step, given by `points` of (step, value) in increasing order of step.

    "steps" holds each value until the next point; "linear" joins the points by straight lines. Before the first point
    the first value holds, after the last point the last.
    """

    points: tuple[tuple[int, float], ...]
    between: Literal["steps", "linear"] = "steps"

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.points]
        if not steps or any(later <= earlier for earlier, later in pairwise(steps)):
            raise InputError(f"a schedule needs at least one point, and its steps must increase; got steps {steps}")
        if not all(isfinite(value) for _, value in self.points):
            raise InputError(f"the values of a schedule must be finite numbers; got {self.points}")
        if self.between not in ("steps", "linear"):
            raise InputError(f"a schedule goes between its points by 'steps' or 'linear'; got {self.between!r}")

    def at(self, step: int) -> float:
        """The value at training step `step`."""
        earlier = [point for point in self.points if point[0] <= step]
        later = [point for point in self.points if point[0] > step]
        if not earlier:
            return self.points[0][1]
        if not later or self.between == "steps":
            return earlier[-1][1]
        (start, first), (end, last) = earlier[-1], later[0]
        return first + (last - first) * (step - start) / (end - start)


@dataclass(frozen=True, slots=True)
class Weighted:
    """A term with its weight, fixed or scheduled over the training step, and another name where it needs one."""

    term: Term
    weight: float | Schedule = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Schedule) and not isfinite(self.weight):
            raise InputError(f"the weight of the term {self.term.name!r} must be a finite number; got {self.weight}")
        if not self.name:
            object.__setattr__(self, "name", self.term.name)

    def at(self, step: int) -> float:
        """The weight at training step `step`."""
        return self.weight.at(step) if isinstance(self.weight, Schedule) else self.weight


@dataclass(frozen=True, slots=True)
class RewardSum:
    """The weighted sum of terms: what a protocol holds and pays by.

    With `right_beats_wrong`, each seat's smallest total for a right answer exceeds its largest for a wrong one by at
    least `margin`, within each group: where it does not already, all wrong answers of the group are lowered by the one
    smallest amount that makes it so. Right answers keep their totals and wrong ones their distances from each other.
    The amount is a term of its own, "right beats wrong" (0 where nothing was lowered).
    """

    LOWERED: ClassVar[str] = "right beats wrong"

    terms: tuple[Weighted | Term, ...]
    right_beats_wrong: bool = False
    margin: float = 0.1

    def __post_init__(self) -> None:
        names = [term.name for term in self.weighted] + [self.LOWERED]
        if not self.terms or len(set(names)) < len(names):
            raise InputError(
                f"a sum needs at least one term, and a name of its own for each; got {names[:-1]} "
                f"({self.LOWERED!r} is taken): rename one by Weighted(term, weight, name=...)"
            )
        if not (isfinite(self.margin) and self.margin > 0):
            raise InputError(f"the margin between right and wrong must be finite and above 0; got {self.margin}")

    @property
    def weighted(self) -> tuple[Weighted, ...]:
        """The terms, each with its weight, which is 1 where none was given."""
        return tuple(term if isinstance(term, Weighted) else Weighted(term) for term in self.terms)

    def __call__(self, group: Sequence[Episode], seats: Sequence[str], step: int = 0) -> list[Mapping[str, Reward]]:
        """What each seat is paid for each episode of `group`, in order, at training step `step`.

        Raises ValueError for an empty group, several problems in one group, or an episode without a grade.
        """
        check_group(group)
        columns = {seat: self._column(group, seat, step) for seat in seats}
        return [{seat: column[index] for seat, column in columns.items()} for index in range(len(group))]

    def _column(self, group: Sequence[Episode], seat: str, step: int) -> list[Reward]:
        rows: list[dict[str, float]] = [{} for _ in group]
        for term in self.weighted:
            weight = term.at(step)
            for row, value in zip(rows, term.term.pay(group, seat), strict=True):
                row[term.name] = weight * value
        for row, episode in zip(rows, group, strict=True):
            if not all(map(isfinite, row.values())):
                raise InputError(
                    f"a reward must be finite; seat {seat!r} in episode {episode.id!r} got {row}: mend that term"
                )
        if self.right_beats_wrong:
            lowered = self._lowered(group, rows)
            for row, episode in zip(rows, group, strict=True):
                row[self.LOWERED] = 0.0 if episode.right else lowered
        return [Reward(row) for row in rows]

    def _lowered(self, group: Sequence[Episode], rows: Sequence[Mapping[str, float]]) -> float:
        right = [fsum(row.values()) for row, episode in zip(rows, group, strict=True) if episode.right]
        wrong = [fsum(row.values()) for row, episode in zip(rows, group, strict=True) if not episode.right]
        return min(0.0, min(right) - self.margin - max(wrong)) if right and wrong else 0.0


def check_group(group: Sequence[Episode]) -> None:
    """Raise ValueError unless `group` holds graded episodes of one problem, and at least one of them."""
    if not group:
        raise ValueError("a group holds all episodes sampled on one problem; this one is empty")
    problems = sorted({episode.transcript.problem.id for episode in group})
    if len(problems) > 1:
        raise ValueError(f"a group holds episodes of one problem; this one has {problems}: group them by problem first")
    for episode in group:
        if episode.grade is None:
            why = f"it ended in an error ({episode.error})" if episode.error else "it was never graded"
            raise ValueError(f"episode {episode.id!r} has no grade, since {why}: leave it out of the group")


@dataclass(frozen=True, slots=True)
class Correctness(Term):
    """1 for a right answer, else 0, for every seat alike. EM in Long⊗Short (arXiv 2505.11827, eq. 9)."""

    name: ClassVar[str] = "correctness"

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        """1 where the episode ended in a right answer, else 0."""
        return [float(episode.right) for episode in group]


@dataclass(frozen=True, slots=True)
class Format(Term):
    """The share of a seat's turns that are well formed, in [0, 1]. FM in Long⊗Short (arXiv 2505.11827, eq. 9).

    `tags` gives, by seat, the tags that a turn may open with and those that it may close with; an empty tuple asks for
    none. A turn (prefill and sampled text, white space around it ignored) is well formed when it opens and closes so,
    the seat itself said something in between, and no other tag *of this protocol*, of whichever seat, stands there.
    Any other "<" is text: the authors' pattern rejects it, and with it "a < b".

    A seat that never spoke is paid 1. It broke no rule and chose nothing, so its silence must not move the group's
    mean, against which its well-formed turns in other episodes would otherwise look like an achievement.
    """

    name: ClassVar[str] = "format"

    tags: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]

    def __post_init__(self) -> None:
        for seat, sides in self.tags.items():
            # A bare string is a sequence of strings too, and would be read as one tag per letter.
            if len(sides) != 2 or any(isinstance(side, str) or not all(side) for side in sides):
                raise InputError(
                    f"the tags of seat {seat!r} must be two tuples of non-empty strings, openings and closings, such "
                    f"as (('<think>',), ('</think>',)); got {sides!r}"
                )

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        """The mean over the seat's turns of 1 (well formed) or 0; 1 where it never spoke."""
        if seat not in self.tags:
            raise InputError(f"no tags for seat {seat!r}, only for {list(self.tags)}; if it needs none: ((), ())")
        return [self._share(episode.transcript, seat) for episode in group]

    def _share(self, transcript: Transcript, seat: str) -> float:
        turns = [self.well_formed(step) for step in transcript.steps if step.seat == seat]
        return sum(turns) / len(turns) if turns else 1.0

    def well_formed(self, step: Step) -> bool:
        """Whether the turn is well formed."""
        openings, closings = self.tags[step.seat]
        forbidden = [tag for sides in self.tags.values() for side in sides for tag in side]
        text, sampled = step.text.strip(), step.reply.text.strip()
        for opening in openings or ("",):
            for closing in closings or ("",):
                if text.startswith(opening) and text.endswith(closing):
                    inside = text[len(opening) : len(text) - len(closing)]
                    # A prefill that says something by itself does not make up for a seat that says nothing.
                    said = sampled.removeprefix(opening).removesuffix(closing)
                    if inside and said.strip() and not any(tag in inside for tag in forbidden):
                        return True
        return False


@dataclass(frozen=True, slots=True)
class ThinklessTable(Term):
    """The whole reward of Thinkless (arXiv 2505.13379, §3.2), in which a short right answer is worth more than a long.

    1 for `<short>` and right, 1 − `gamma` for `<think>` and right, −1 for wrong, missing or unparsable. A right answer
    after neither token has no row in the paper and is paid −1, so that leaving the token out never pays. The authors
    use gamma = 0.5; their own rerun lowers it to 0.2.
    """

    name: ClassVar[str] = "thinkless"

    gamma: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.gamma < 1:
            raise InputError(f"gamma must lie between 0 and 1, both excluded; got {self.gamma}")

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        """The table's entry for each episode, from the mode that its first step chose."""
        right = {SHORT: 1.0, THINK: 1.0 - self.gamma}
        return [right.get(mode_of(episode.transcript) or "", -1.0) if episode.right else -1.0 for episode in group]


def mode_of(transcript: Transcript) -> str | None:
    """The mode of a Thinkless transcript, `SHORT` or `THINK`, or None where no mode was chosen.

    A forced mode is the prefill of the first step; a chosen one is the control token at which the first reply stopped.
    Nothing later counts: the authors' code searches the whole text, and so pays a long answer that mentions `<short>`
    as a short one.
    """
    if not transcript.steps:
        return None
    first = transcript.steps[0]
    return next((token for token in (first.prefill, first.reply.stop) if token in (SHORT, THINK)), None)
