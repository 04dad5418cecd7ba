"""What a lone agent would have got for the same tokens, reckoned from samples that it has already played.

Whatever several agents or several modes achieve is to be held against these. A group is all episodes of the lone agent
on one problem.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb
from statistics import fmean

import numpy as np

from turnwise.analysis.statistics import Estimate, change
from turnwise.environments.episode import Episode
from turnwise.environments.equivalence import tidy
from turnwise.environments.errors import InputError
from turnwise.rl.summary import Interval, over_problems

SUBSETS, POINTS = 200, 60  # at the most: subsets of a problem's samples that vote, budgets of the lone agent


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
    return capped(groups, cap_for(groups, tokens))


def capped(groups: Sequence[Sequence[Episode]], cap: int) -> Control:
    """The lone agent where no episode may have more than `cap` tokens."""
    episodes = [episode for group in groups for episode in group]
    lengths = [episode.transcript.token_count for episode in episodes]
    right = fmean(episode.right and length <= cap for episode, length in zip(episodes, lengths, strict=True))
    return Control(right, fmean(min(cap, length) for length in lengths))


def cap_for(groups: Sequence[Sequence[Episode]], tokens: float) -> int:
    """The cap on an episode's tokens with which the lone agent spends `tokens` on average, or just below."""
    lengths = sorted(episode.transcript.token_count for group in groups for episode in group)
    spent, cap = 0.0, 0
    for index, length in enumerate(lengths):  # up to `length`, all episodes from here on are cut
        room = (tokens * len(lengths) - spent) / (len(lengths) - index) + 1e-9  # what rounding may have taken
        cap = int(min(length, room))
        if cap < length:
            break
        spent += length
    return cap


def majority(groups: Sequence[Sequence[Episode]], votes: int) -> Control:
    """Self-consistency (arXiv 2203.11171): the answer that most of the first `votes` samples give.

    Right answers are one, however they are written, since the grader found each of them equal to the gold answer;
    others are where they are written alike. At a tie, the earliest wins. Samples without an answer do not vote.
    """
    right, tokens = list[bool](), list[int]()
    for group in groups:
        asked = group[:votes]
        answers = Counter(e.right or tidy(e.grade.answer) for e in asked if e.grade and e.grade.answer is not None)
        right.append(bool(answers) and answers.most_common(1)[0][0] is True)
        tokens.append(sum(episode.transcript.token_count for episode in asked))
    return Control(fmean(right), fmean(tokens))


def voting(groups: Sequence[Sequence[Episode]], votes: int, *, seed: int = 0) -> Control:
    """Self-consistency with so many votes, on average over which of a problem's samples vote.

    Over all subsets of them or, where these are more than `SUBSETS`, over so many that are drawn.
    """
    drawn = [majority(_subsets(group, min(votes, len(group)), seed), votes) for group in groups]
    return Control(fmean(one.accuracy for one in drawn), fmean(one.tokens for one in drawn))


def _subsets(group: Sequence[Episode], size: int, seed: int) -> list[Sequence[Episode]]:
    if comb(len(group), size) <= SUBSETS:
        return list(combinations(group, size))
    rng = random.Random(f"{seed} {group[0].transcript.problem.id} {size}")
    places = (sorted(rng.sample(range(len(group)), size)) for _ in range(SUBSETS))
    return [[group[place] for place in chosen] for chosen in places]


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


@dataclass(frozen=True, slots=True)
class Budgets:
    """A team, with the 95% interval of its accuracy, and what a lone agent gets on the same problems for any budget.

    `cut_short` has the lone agent under caps from 0 up to where nothing is cut, `voting` its self-consistency by the
    number of votes: 1, 2, 4, ... up to all samples. `same_tokens` are both for the tokens of the team; between two
    numbers of votes a lot decides for each problem, and where the samples do not suffice, all of them vote. `gains` are
    the team's accuracy less theirs, means over problems, with the paired 95% interval.
    """

    problems: int
    team: Control
    interval: Interval
    cut_short: tuple[Control, ...]
    voting: Mapping[int, Control]
    same_tokens: Mapping[str, Control]
    gains: Mapping[str, Estimate]


def at_all_budgets(team: Sequence[Episode], alone: Sequence[Episode]) -> Budgets:
    """Holds a team's episodes against a lone agent's stored samples. Raises InputError where no problem is both's."""
    groups = {group[0].transcript.problem.id: group for group in by_problem(alone)}
    held = [e for e in team if e.grade is not None and e.transcript.problem.id in groups]
    if not held:
        raise InputError(
            f"none of the {len(groups)} problems that the lone agent answered is the team's; let it play the same ones"
        )
    # In the order of ids: that in which episodes ended must not decide what is drawn.
    ours = sorted(by_problem(held), key=lambda group: group[0].transcript.problem.id)
    lone = [groups[group[0].transcript.problem.id] for group in ours]
    right = sum(episode.right for episode in held)
    tokens = fmean(episode.transcript.token_count for episode in held)
    most = voting(lone, 1).tokens
    samples = min(map(len, lone))
    numbers = sorted({*(2**power for power in range(samples.bit_length())), samples})
    votes = {number: voting(lone, number) for number in numbers}
    cap, (fewer, more, share) = cap_for(lone, tokens), _votes_for(votes, tokens)
    alone_right = {
        "cut short": [capped([group], cap).accuracy for group in lone],
        "voting": [mixed(voting([g], more), voting([g], fewer), share).accuracy for g in lone],
    }
    right_of = np.array([fmean(episode.right for episode in group) for group in ours])
    return Budgets(
        problems=len(ours),
        team=Control(right / len(held), tokens),
        interval=over_problems(held),
        cut_short=tuple(cut_short(lone, most * point / POINTS) for point in range(POINTS + 1)),
        voting=votes,
        same_tokens={"cut short": capped(lone, cap), "voting": mixed(votes[more], votes[fewer], share)},
        gains={name: change(right_of, np.array(column)) for name, column in alone_right.items()},
    )


def _votes_for(votes: Mapping[int, Control], tokens: float) -> tuple[int, int, float]:
    """The two numbers of votes around so many tokens, and the share of problems on which the greater one votes."""
    for fewer, more in pairwise(votes):
        if votes[fewer].tokens <= tokens < votes[more].tokens:
            return fewer, more, (tokens - votes[fewer].tokens) / (votes[more].tokens - votes[fewer].tokens)
    only = min(votes) if tokens < votes[min(votes)].tokens else max(votes)
    return only, only, 1.0
