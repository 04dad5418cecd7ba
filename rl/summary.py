"""What a set of episodes adds up to: accuracy, tokens, turns, and what brevity cost."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from turnwise.environments.environment import Outcome
from turnwise.environments.episode import Episode
from turnwise.protocols.rewards import THINK, mode_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Interval = tuple[float, float]
F = TypeVar("F", float, "NDArray[np.float64]")


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures over finished episodes; those that an exception ended are counted in `failed` and in nothing else.

    `accuracy` in [0, 1] with its 95% interval, that of `over_problems`. `tokens` are sampled tokens an episode, whole
    dialogue; `seat_tokens` the same for each seat. `turns` is the mean number of turns. `outcomes` counts what grading
    found. `think_share` is the share of episodes that chose to think, of those that opened with a control token which
    chose (None: none did).
    """

    episodes: int
    failed: int
    accuracy: float
    interval: Interval
    tokens: float
    seat_tokens: Mapping[str, float]
    turns: float
    think_share: float | None
    outcomes: Mapping[Outcome, int]


def summarise(episodes: Iterable[Episode]) -> Summary:
    """The figures of some episodes, of one protocol. Raises ValueError where none of them finished."""
    everything = list(episodes)
    finished = [episode for episode in everything if episode.grade is not None]
    if not finished:
        raise ValueError(f"a summary needs at least one finished episode; all of the {len(everything)} given failed")
    right = sum(episode.right for episode in finished)
    seats: Counter[str] = Counter()
    for episode in finished:
        for step in episode.transcript.steps:
            seats[step.seat] += step.reply.token_count
    modes = [mode for episode in finished if (mode := mode_of(episode.transcript))]
    return Summary(
        episodes=len(finished),
        failed=len(everything) - len(finished),
        accuracy=right / len(finished),
        interval=over_problems(finished),
        tokens=fmean(episode.transcript.token_count for episode in finished),
        seat_tokens={seat: tokens / len(finished) for seat, tokens in seats.items()},
        turns=fmean(len(episode.transcript.steps) for episode in finished),
        think_share=fmean(mode == THINK for mode in modes) if modes else None,
        outcomes=Counter(episode.grade.outcome for episode in finished if episode.grade is not None),
    )


def by_level(episodes: Sequence[Episode]) -> dict[int, Summary]:
    """A summary for each level of difficulty of which an episode finished, in order."""
    levels = sorted({episode.transcript.problem.level for episode in episodes if episode.grade is not None})
    return {level: summarise(e for e in episodes if e.transcript.problem.level == level) for level in levels}


def record(episodes: Sequence[Episode]) -> dict[str, object]:
    """The summary of some episodes, and that of each level, as what JSON can hold."""
    levels = {str(level): _plain(summary) for level, summary in by_level(episodes).items()}
    return {**_plain(summarise(episodes)), "levels": levels}


def _plain(summary: Summary) -> dict[str, object]:
    outcomes = {str(outcome): count for outcome, count in summary.outcomes.items()}
    return {**asdict(summary), "outcomes": outcomes}


def over_problems(episodes: Iterable[Episode]) -> Interval:
    """The 95% interval of the share of some episodes that are right, whose problems alone are independent.

    Wilson's for so many episodes as would have the variance of that share: n = p(1 − p) / s², with s² = G/(G − 1) ·
    Σ (nᵢ/N)² (pᵢ − p)² over G problems of nᵢ of the N episodes (Korn & Graubard 1998, Survey Methodology 24). n is N at
    the most, and G where s² is 0: problems that are all alike tell of so many.
    """
    groups = defaultdict[str, list[bool]](list)
    for episode in episodes:
        groups[episode.transcript.problem.id].append(episode.right)
    number, right, problems = sum(map(len, groups.values())), sum(map(sum, groups.values())), len(groups)
    # In whole numbers, in which what is alike is equal: N⁴ Σ (nᵢ/N)² (pᵢ − p)².
    apart = sum((sum(group) * number - len(group) * right) ** 2 for group in groups.values())
    trials: float = problems
    if apart and number > problems:
        trials = min(number, right * (number - right) * number**2 * (problems - 1) / (problems * apart))
    return wilson(right * trials / number, trials)


def wilson(successes: float, trials: float, z: float = 1.959964) -> Interval:
    """The Wilson score interval of a proportion (Wilson 1927), 95% by default, within [0, 1]."""
    share, spread = successes / trials, z * z / trials
    centre = share + spread / 2
    half = z * sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def accuracy_efficiency_score(accuracy: F, tokens: F, *, base_accuracy: F, base_tokens: F) -> F:
    """AES against a baseline: Δlength + 3·Δaccuracy, or Δlength + 5·Δaccuracy where accuracy was lost.

    Δlength = (base_tokens − tokens) / base_tokens and Δaccuracy = (accuracy − base_accuracy) / base_accuracy, both
    relative, so that more is better (Long⊗Short, arXiv 2505.11827; O1-Pruner, arXiv 2501.12570). The first prints the
    sign of the 5 wrongly; its own numbers need this form. For numbers, or for arrays of them.
    """
    shorter = (base_tokens - tokens) / base_tokens
    gained = (accuracy - base_accuracy) / base_accuracy
    return shorter + (3 + 2 * (gained < 0)) * gained
