"""What a lone agent would have got for the same tokens, reckoned from samples that it has already played.

Whatever several agents or several modes achieve is to be held against these. A group is all episodes of the lone agent
on one problem.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from turnwise.environments.episode import Episode


@dataclass(frozen=True, slots=True)
class Control:
    """What was right, in [0, 1], in how many sampled tokens a problem."""

    accuracy: float
    tokens: float


def by_problem(episodes: Sequence[Episode]) -> list[list[Episode]]:
    """The graded episodes of each problem, by sample."""
    groups = defaultdict[str, list[Episode]](list)
    for episode in sorted((e for e in episodes if e.grade is not None), key=lambda episode: episode.sample):
        groups[episode.transcript.problem.id].append(episode)
    return list(groups.values())


def cut_short(groups: Sequence[Sequence[Episode]], tokens: float) -> Control:
    """The lone agent under the cap on an episode's tokens with which it spends `tokens` on average, or just below.

    An episode that the cap cuts off has no answer, and is wrong.
    """
    episodes = [episode for group in groups for episode in group]
    lengths = sorted(episode.transcript.token_count for episode in episodes)
    spent, cap = 0.0, 0
    for index, length in enumerate(lengths):  # up to `length`, all episodes from here on are cut
        room = (tokens * len(lengths) - spent) / (len(lengths) - index) + 1e-9  # what rounding may have taken
        cap = int(min(length, room))
        if cap < length:
            break
        spent += length
    right = fmean(episode.right and episode.transcript.token_count <= cap for episode in episodes)
    return Control(right, fmean(min(cap, length) for length in lengths))


def majority(groups: Sequence[Sequence[Episode]], votes: int) -> Control:
    """Self-consistency (arXiv 2203.11171): the answer that most of the first `votes` samples give.

    At a tie, the earliest of them. Samples without an answer do not vote.
    """
    right, tokens = list[bool](), list[int]()
    for group in groups:
        asked = group[:votes]
        answers = [episode.grade.answer for episode in asked if episode.grade and episode.grade.answer is not None]
        elected = Counter(answers).most_common(1)[0][0] if answers else None
        right.append(any(e.right for e in asked if e.grade and elected is not None and e.grade.answer == elected))
        tokens.append(sum(episode.transcript.token_count for episode in asked))
    return Control(fmean(right), fmean(tokens))


def mixed(first: Control, second: Control, share: float) -> Control:
    """A choice by lot: `share` of the problems go to the first, the rest to the second."""
    return Control(
        share * first.accuracy + (1 - share) * second.accuracy, share * first.tokens + (1 - share) * second.tokens
    )


def for_same_tokens(
    runs: Mapping[str, Sequence[Episode]], trained: str, *, thorough: str, brief: str
) -> dict[str, Control]:
    """What is to be held against the run `trained`, for its mean tokens, by what two lone agents have played.

    The thorough one cut short; one of the two by lot for each problem; the brief one voting with as many samples, or
    with all that it has.
    """
    tokens = fmean(episode.transcript.token_count for episode in runs[trained] if episode.grade is not None)
    slow, quick = by_problem(runs[thorough]), by_problem(runs[brief])
    long, short = majority(slow, 1), majority(quick, 1)
    votes = min(max(1, round(tokens / short.tokens)), min(map(len, quick)))
    share = min(1.0, max(0.0, (tokens - short.tokens) / ((long.tokens - short.tokens) or 1.0)))
    return {
        f"{thorough}, cut short": cut_short(slow, tokens),
        f"{thorough} or {brief}, by lot": mixed(long, short, share),
        f"{brief}, majority of {votes}": majority(quick, votes),
    }
