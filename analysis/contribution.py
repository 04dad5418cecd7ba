"""Who mattered: stored episodes played again with one seat silent, or filled by another agent.

Only what the change can reach is played: a turn of another seat that would be asked the same, with the same seed, gets
its stored reply, and an answer that was graded keeps its grade. So both plays differ by the seat alone, problem by
problem, and what the seat is worth is a paired difference. The other agents must be those of the run.
"""

import re
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from turnwise.agents.agent import Agent
from turnwise.agents.replay import BranchingAgent, same_turn
from turnwise.agents.scripted import ScriptedAgent, cut
from turnwise.analysis.statistics import Estimate, bootstrap, change
from turnwise.environments.environment import Environment, Grade, Grader
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.seeds import turn_seed
from turnwise.environments.transcript import Reply, Turn
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.rl.rollout import Store, Team, rollout

Column = NDArray[np.float64]
"""A figure of each problem."""

ABLATED = "ablated"
EMPTY_SHARE = 0.5  # of a seat's turns without substance: from here on it is said to be lazy
_TAG = re.compile(r"</?\w[\w ]*>")


def ablated(says: str = "") -> ScriptedAgent:
    """An agent that is not there: it says nothing, or the same few words in each turn, and has sampled no token.

    A turn without a word goes on as the protocol has it where an agent ends its turn without a closing tag, and its
    readers see it closed. Where they must see more than that, such as "<think></think>", `says` is that.
    """
    return ScriptedAgent(lambda turn, seed: replace(cut(says, turn), token_count=0, model=ABLATED))


@dataclass(frozen=True, slots=True)
class Marginal:
    """The mean of something as the team played it and without the seat, and by how much the seat raises it.

    Means are over problems, of means over a problem's samples; `low` and `high` are the 95% interval of `gain`, paired
    by problem.
    """

    team: float
    without: float
    gain: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Contribution:
    """What a seat is worth, against `instead` in it.

    `episodes` are those that were graded in both plays, on so many `problems`; `failed` those that an exception ended
    in the second. `tokens` are sampled ones, all seats together; `seat_tokens` those of the seat, an episode, in the
    first. `reached` is the share of episodes in which the seat spoke, `empty` the share of its turns in which it said
    nothing but tags (None: it took none). `new_tokens` had to be sampled for the second play. `strangers` are the other
    seats for which a model spoke in the second play that had not in the first.
    """

    seat: str
    instead: str
    problems: int
    episodes: int
    failed: int
    accuracy: Marginal
    tokens: Marginal
    seat_tokens: float
    reached: float
    empty: float | None
    new_tokens: int
    strangers: tuple[str, ...] = ()

    @property
    def alarms(self) -> list[str]:
        """What makes the seat look lazy or harmful, and what makes the figures doubtful, a sentence each."""
        found = [f"{seat} was not filled by the run's model: the difference is its own, too" for seat in self.strangers]
        if self.empty is None:
            found.append(f"{self.seat} never spoke")
        elif self.empty >= EMPTY_SHARE:
            found.append(f"{self.seat} says nothing but tags in {self.empty:.0%} of its turns")
        if self.accuracy.high < 0:
            found.append(
                f"the team is better without {self.seat}: with {self.instead} as {self.seat} accuracy rises "
                f"({-self.accuracy.high:+.1%} to {-self.accuracy.low:+.1%})"
            )
        elif self.accuracy.low <= 0:
            found.append(
                f"with {self.instead} as {self.seat} accuracy changes by nothing that {self.problems} problems can "
                f"show ({0 - self.accuracy.high:+.1%} to {0 - self.accuracy.low:+.1%})"
            )
        return found


async def branch(
    protocol: ReasoningProtocol,
    team: Team,
    grader: Grader,
    episodes: Sequence[Episode],
    seat: str,
    agent: Agent,
    *,
    concurrency: int = 64,
    store: Store | None = None,
) -> AsyncGenerator[Episode, None]:
    """Plays the graded ones of `episodes` again with `agent` in `seat`, and yields them as they end.

    `team` fills the other seats, as it did in the run. `store` keeps the episodes as `rollout` does, and what it holds
    is not played again. Raises InputError for episodes that `protocol` did not play, of several runs, or none.
    """
    graded = [episode for episode in episodes if episode.grade is not None]
    if seat not in protocol.seats:
        raise InputError(f"the protocol has no seat {seat!r}; its seats are {list(protocol.seats)}")
    if len(seeds := {episode.seed for episode in graded}) != 1:
        raise InputError(f"a seat's contribution is told from the episodes of one run; these are of {len(seeds)} seeds")
    (seed,) = seeds
    said = _said(protocol, graded)
    branched = {other: agent if other == seat else BranchingAgent(team[other], said) for other in {*team, seat}}
    problems = {episode.transcript.problem.id: episode.transcript.problem for episode in graded}
    stream = rollout(
        protocol, branched, Environment("branched", list(problems.values()), _Grades(protocol, graded, grader)),
        samples=1 + max(episode.sample for episode in graded), seed=seed, concurrency=concurrency,
        store=store, only={episode.id for episode in graded},
    )  # fmt: skip
    async for episode in stream:
        yield episode


def contribution(
    protocol: ReasoningProtocol, seat: str, instead: str, episodes: Sequence[Episode], branched: Sequence[Episode]
) -> Contribution:
    """What `seat` was worth in `episodes`, by what became of them in `branched`.

    Raises InputError where no episode was graded in both.
    """
    first = {episode.id: episode for episode in episodes if episode.grade is not None}
    again = {episode.id: episode for episode in branched if episode.id in first}
    pairs = [(first[id], episode) for id, episode in again.items() if episode.grade is not None]
    if not pairs:
        raise InputError(
            f"none of {len(first)} graded episodes was graded when played again with {instead} as {seat}; "
            "look at their errors"
        )
    before = [one for one, _ in pairs]
    taken = [step for one in before for step in one.transcript.steps if step.seat == seat]
    # A control token chooses, tag as it is.
    bare = [step.state not in protocol.control_states and not _TAG.sub("", step.reply.text).strip() for step in taken]
    return Contribution(
        seat=seat,
        instead=instead,
        problems=len({one.transcript.problem.id for one in before}),
        episodes=len(pairs),
        failed=len(again) - len(pairs),
        accuracy=_marginal(pairs, lambda episode: float(episode.right), change),
        tokens=_marginal(pairs, lambda episode: float(episode.transcript.token_count), _mean_difference),
        seat_tokens=sum(step.reply.token_count for step in taken) / len(pairs),
        reached=fmean(any(step.seat == seat for step in one.transcript.steps) for one in before),
        empty=fmean(bare) if bare else None,
        new_tokens=sum(_new_tokens(protocol, seat, one, other) for one, other in pairs),
        strangers=tuple(sorted({other for other, _ in _speakers(again.values()) - _speakers(before)} - {seat})),
    )


def _mean_difference(ours: Column, theirs: Column) -> Estimate:
    return bootstrap(lambda sums: (sums[..., 0] - sums[..., 1]) / len(ours), np.column_stack([ours, theirs]))


def _marginal(
    pairs: Sequence[tuple[Episode, Episode]],
    figure: Callable[[Episode], float],
    gain: Callable[[Column, Column], Estimate],
) -> Marginal:
    by_problem = defaultdict[str, list[tuple[float, float]]](list)
    for one, other in pairs:
        by_problem[one.transcript.problem.id].append((figure(one), figure(other)))
    # In the order of ids: that in which episodes ended must not decide what is drawn.
    means = np.array([np.mean(by_problem[id], axis=0) for id in sorted(by_problem)])
    found = gain(means[:, 0], means[:, 1])
    return Marginal(float(means[:, 0].mean()), float(means[:, 1].mean()), found.value, found.low, found.high)


def _speakers(episodes: Iterable[Episode]) -> set[tuple[str, str]]:
    """Each seat with each model that spoke for it."""
    return {(step.seat, step.reply.model) for episode in episodes for step in episode.transcript.steps}


def _turns(protocol: ReasoningProtocol, episode: Episode) -> list[Turn]:
    """What was asked in each turn of a finished episode. Raises InputError where another protocol asked it."""
    steps, turns = episode.transcript.steps, list[Turn]()
    while asked := protocol.next_turns(episode.transcript.prefix(len(turns))):
        for turn, step in zip_longest(asked, steps[len(turns) : len(turns) + len(asked)]):
            if step is None or (step.seat, step.state) != (turn.seat, turn.state):
                raise _other_protocol(episode, len(turns))
            if step.reply.token_count > turn.max_tokens:
                raise _other_protocol(episode, len(turns))
        turns += asked
    if len(turns) < len(steps):
        raise _other_protocol(episode, len(turns))
    return turns


def _other_protocol(episode: Episode, place: int) -> InputError:
    return InputError(
        f"{episode.id} was not played by this protocol: they part at turn {place}; give the run's own, with its budgets"
    )


def _said(protocol: ReasoningProtocol, episodes: Sequence[Episode]) -> dict[int, tuple[Turn, Reply]]:
    """Every turn that was taken, by its seed, with the reply."""
    return {
        turn_seed(episode.seed, episode.transcript.problem.id, episode.sample, place): (turn, step.reply)
        for episode in episodes
        for place, (turn, step) in enumerate(zip(_turns(protocol, episode), episode.transcript.steps, strict=True))
    }


def _new_tokens(protocol: ReasoningProtocol, seat: str, one: Episode, other: Episode) -> int:
    """The tokens of the turns of `other` that the replies in `one` did not answer."""
    asked = zip_longest(_turns(protocol, one), _turns(protocol, other))
    return sum(
        step.reply.token_count
        for step, (known, turn) in zip(other.transcript.steps, asked, strict=False)
        if turn.seat == seat or known is None or not same_turn(known, turn)
    )


class _Grades(Grader):
    """Gives an answer the grade that the run gave it, and asks another grader about the rest."""

    def __init__(self, protocol: ReasoningProtocol, episodes: Sequence[Episode], grader: Grader) -> None:
        self._known: Mapping[tuple[str, str], Grade] = {
            (episode.transcript.problem.id, protocol.answer(episode.transcript)): episode.grade
            for episode in episodes
            if episode.grade is not None
        }
        self._grader = grader

    async def grade(self, problem: Problem, text: str) -> Grade:
        """The known grade, or a new one."""
        return self._known.get((problem.id, text)) or await self._grader.grade(problem, text)
