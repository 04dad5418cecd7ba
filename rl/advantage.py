"""Advantages: what an episode was worth against the others of its group, as pure functions of the rewards.

A group is what shares a baseline: usually the episodes of one problem, for one seat. All functions take the rewards of
all groups at once, and for each the number of its group (0, 1, ...).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int

from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.protocols.rewards import Reward
from turnwise.rl.trajectory import Trajectory, trajectories

EPSILON = 1e-6

Rewards = Float[torch.Tensor, " samples"]
Groups = Int[torch.Tensor, " samples"]
Estimator = Literal["mean-centred", "grpo", "rloo", "reinforce++"]
Grouping = Literal["seat", "turn", "pooled"]


def mean_centred(rewards: Rewards, groups: Groups) -> Rewards:
    """A = r − mean. Dr. GRPO (arXiv 2503.20783, §3.2), and Thinkless (arXiv 2505.13379, §3.2)."""
    return rewards - _means(rewards, groups)


def grpo(rewards: Rewards, groups: Groups) -> Rewards:
    """A = (r − mean) / std, std of the sample (n − 1). GRPO (arXiv 2402.03300, §4.1.2).

    Where all rewards of a group are nearly equal, this makes their small differences as large as any.
    """
    centred = rewards - _means(rewards, groups)
    counts = _counts(rewards, groups)
    deviation = (_means(centred.square(), groups) * counts / (counts - 1)).sqrt()
    return centred / (deviation + EPSILON)


def rloo(rewards: Rewards, groups: Groups) -> Rewards:
    """A = r − mean of the *other* samples = n / (n − 1) · (r − mean). RLOO (arXiv 2402.14740, §2.3)."""
    counts = _counts(rewards, groups)
    return counts / (counts - 1) * (rewards - _means(rewards, groups))


def reinforce_baseline(rewards: Rewards, groups: Groups) -> Rewards:
    """REINFORCE++ with baseline (arXiv 2501.03262, §3.3): r − mean of the group, then / std over the whole batch."""
    centred = rewards - _means(rewards, groups)
    return centred / (centred.square().mean().sqrt() + EPSILON)


ESTIMATORS: Mapping[Estimator, Callable[[Rewards, Groups], Rewards]] = {
    "mean-centred": mean_centred,
    "grpo": grpo,
    "rloo": rloo,
    "reinforce++": reinforce_baseline,
}


@dataclass(frozen=True, slots=True)
class Sample:
    """A trajectory, and the advantage of each of its turns."""

    trajectory: Trajectory
    advantages: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Credit:
    """The samples of one policy, and what is to be known of their groups.

    `equal` of the `groups` had all rewards equal, so that nothing is learnt from them. `single` held but one episode (a
    turn that no other episode of the problem got to, or an episode whose company failed), which has no baseline: its
    advantage is 0.
    """

    samples: tuple[Sample, ...]
    groups: int
    equal: int
    single: int


class _Stake(NamedTuple):
    """What gets one advantage: a seat's part in an episode, or one turn of it."""

    problem: int
    episode: int
    seat: str
    turn: int


def assign_credit(
    episodes: Sequence[Sequence[Episode]],
    paid: Sequence[Sequence[Mapping[str, Reward]]],
    seats: Sequence[str],
    *,
    estimator: Estimator = "mean-centred",
    grouping: Grouping = "seat",
    skip_equal: bool = False,
) -> Credit:
    """The samples of the policy in `seats`, of `episodes` and what was `paid` for them, both problem by problem.

    A group is a problem's episodes for one seat ("seat": Dr. MAS, arXiv 2602.08847), for one seat and the n-th of its
    turns ("turn": AT-GRPO, arXiv 2510.11062), or for all seats, those of other policies included ("pooled": one
    baseline for all, kept to compare with). With `skip_equal`, sequences of groups whose rewards are all equal are left
    out, and so out of every mean over the batch (DAPO's dynamic sampling, arXiv 2503.14476, without sampling anew).

    Raises InputError for a reward that is not a finite number.
    """
    stakes, rewards, numbers = list[_Stake](), list[float](), list[int]()
    known: dict[tuple[int, str, int], int] = {}
    for problem, (group, rewarded) in enumerate(zip(episodes, paid, strict=True)):
        for index, (episode, by_seat) in enumerate(zip(group, rewarded, strict=True)):
            spoken = Counter(step.seat for step in episode.transcript.steps)
            for seat in by_seat if grouping == "pooled" else seats:
                for turn in range(spoken[seat] if grouping == "turn" else min(spoken[seat], 1)):
                    stakes.append(_Stake(problem, index, seat, turn))
                    rewards.append(by_seat[seat].total)
                    key = (problem, "" if grouping == "pooled" else seat, turn)
                    numbers.append(known.setdefault(key, len(known)))
    values, groups = torch.tensor(rewards, dtype=torch.float64), torch.tensor(numbers, dtype=torch.long)
    if not values.isfinite().all():
        place = stakes[int((~values.isfinite()).nonzero()[0])]
        raise InputError(
            f"a reward must be a finite number; seat {place.seat!r} was paid {rewards[stakes.index(place)]} for "
            f"{episodes[place.problem][place.episode].id!r}: mend the protocol's reward"
        )
    counts = torch.bincount(groups, minlength=len(known))
    lowest = torch.zeros(len(known), dtype=values.dtype).scatter_reduce(0, groups, values, "amin", include_self=False)
    highest = torch.zeros(len(known), dtype=values.dtype).scatter_reduce(0, groups, values, "amax", include_self=False)
    single, equal = counts == 1, (lowest == highest) & (counts > 1)
    compared, advantages = ~single[groups], torch.zeros_like(values)
    if compared.any():
        advantages[compared] = ESTIMATORS[estimator](values[compared], groups[compared])
    advantages[equal[groups]] = 0.0  # and not what rounding leaves of r − mean
    worth = dict(zip(stakes, zip(advantages.tolist(), equal[groups].tolist(), strict=True), strict=True))

    samples = []
    for problem, group in enumerate(episodes):
        for index, episode in enumerate(group):
            for seat in seats:
                turns = count()
                for trajectory in trajectories(episode, seat):
                    nth = [next(turns) if grouping == "turn" else 0 for _ in trajectory.turns]
                    found = [worth[_Stake(problem, index, seat, turn)] for turn in nth]
                    if not (skip_equal and all(same for _, same in found)):
                        samples.append(Sample(trajectory, tuple(advantage for advantage, _ in found)))
    return Credit(tuple(samples), len(known), int(equal.sum()), int(single.sum()))


def _means(rewards: Rewards, groups: Groups) -> Rewards:
    """For each sample the mean of its group."""
    return torch.bincount(groups, weights=rewards).to(rewards.dtype)[groups] / _counts(rewards, groups)


def _counts(rewards: Rewards, groups: Groups) -> Rewards:
    """For each sample the size of its group."""
    counts = torch.bincount(groups)
    if (counts == 1).any():
        raise InputError(
            f"a group needs at least 2 samples to be its own baseline; group {int((counts == 1).nonzero()[0])} has 1: "
            "sample each problem twice or more"
        )
    return counts[groups].to(rewards.dtype)
