"""Advantages: the numbers of each estimator, and which episodes, seats and turns share a baseline."""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.protocols.rewards import Reward
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.advantage import (
    ESTIMATORS,
    Credit,
    Estimator,
    Grouping,
    assign_credit,
    grpo,
    mean_centred,
    reinforce_baseline,
    rloo,
)

Dialogue = Callable[..., Episode]
EVERY: tuple[Estimator, ...] = ("mean-centred", "grpo", "rloo", "reinforce++")


def floats(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)


# Two groups, of 4 and of 2, one in the midst of the other. The first is the fixture of Thinkless.
REWARDS, GROUPS = floats(1, 2, 0.5, -1, 4, -1), numbers(0, 1, 0, 0, 1, 0)


@pytest.mark.parametrize(
    ("estimator", "advantages"),
    [
        ("mean-centred", (1.125, -1, 0.625, -0.875, 1, -0.875)),
        # Standard deviations √1.0625 = 1.0307764 and √2
        ("grpo", (1.0914093, -0.7071063, 0.6063385, -0.8488739, 0.7071063, -0.8488739)),
        # 4/3 and 2 times the first line
        ("rloo", (1.5, -2, 0.8333333, -1.1666667, 2, -1.1666667)),
        # The root of the mean of all six squares is 0.9298297
        ("reinforce++", (1.2098978, -1.0754647, 0.6721655, -0.9410316, 1.0754647, -0.9410316)),
    ],
)
def test_advantages_of_unequal_groups(estimator: Estimator, advantages: tuple[float, ...]) -> None:
    assert ESTIMATORS[estimator](REWARDS, GROUPS).tolist() == pytest.approx(advantages, abs=2e-7)


def test_every_estimator_is_known_by_name() -> None:
    assert dict(ESTIMATORS) == {
        "mean-centred": mean_centred, "grpo": grpo, "rloo": rloo, "reinforce++": reinforce_baseline
    }  # fmt: skip


def test_grpo_makes_small_differences_as_large_as_any() -> None:
    """Two samples get ±0.707 whatever the gap, which is why the papers' best runs do not divide."""
    small, large = (grpo(floats(0, gap), numbers(0, 0)).tolist() for gap in (0.01, 100))
    assert small == pytest.approx([-0.7071, 0.7071], abs=2e-4)
    assert large == pytest.approx([-0.7071, 0.7071], abs=2e-4)


@pytest.mark.parametrize("estimator", EVERY)
def test_equal_rewards_are_worth_nothing(estimator: Estimator) -> None:
    assert ESTIMATORS[estimator](floats(0.5, 0.5, 0.5), numbers(0, 0, 0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("estimator", EVERY)
def test_a_group_of_one_has_no_baseline(estimator: Estimator) -> None:
    with pytest.raises(InputError, match="at least 2 samples to be its own baseline; group 1 has 1"):
        ESTIMATORS[estimator](floats(1, 2, 3), numbers(0, 1, 0))


def test_single_precision_stays_single() -> None:
    for estimate in ESTIMATORS.values():
        assert estimate(REWARDS.float(), GROUPS).dtype == torch.float32


grouped = st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=6), min_size=1, max_size=4)


def flat(groups: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and the numbers of their groups, in an order that mixes them."""
    entries = [(reward, number) for number, group in enumerate(groups) for reward in group]
    entries = entries[::2] + entries[1::2]
    return floats(*(reward for reward, _ in entries)), numbers(*(number for _, number in entries))


@given(grouped)
def test_centred_rewards_sum_to_zero_in_each_group(groups: list[list[float]]) -> None:
    rewards, of = flat(groups)
    for estimate in ESTIMATORS.values():
        sums = torch.bincount(of, weights=estimate(rewards, of))
        assert sums.tolist() == pytest.approx([0] * len(groups), abs=1e-8)


@given(grouped)
def test_rloo_is_the_distance_to_the_mean_of_the_others(groups: list[list[float]]) -> None:
    rewards, of = flat(groups)
    found, centred = rloo(rewards, of).tolist(), mean_centred(rewards, of).tolist()
    for place, number in enumerate(of.tolist()):
        size = len(groups[number])
        others = (sum(groups[number]) - rewards[place].item()) / (size - 1)
        assert found[place] == pytest.approx(rewards[place].item() - others, abs=1e-9)
        assert found[place] == pytest.approx(size / (size - 1) * centred[place], abs=1e-9)


@given(grouped, st.floats(-50, 50))
def test_what_is_paid_to_a_whole_group_changes_nothing(groups: list[list[float]], shift: float) -> None:
    rewards, of = flat(groups)
    moved = rewards + shift * (of + 1)
    for estimate in ESTIMATORS.values():
        # Where deviations are about EPSILON, dividing by them magnifies what rounding did to the moved rewards.
        assert estimate(moved, of).tolist() == pytest.approx(estimate(rewards, of).tolist(), abs=1e-6)


# Credit


def paid(**rewards: float) -> dict[str, Reward]:
    return {seat: Reward({"term": reward}) for seat, reward in rewards.items()}


def talk(dialogue: Dialogue, seats: str, **how: object) -> Episode:
    """L and S for a turn of the long and of the short seat."""
    turns = [(("long", "think", (7, 8)) if seat == "L" else ("short", "answer", (9,))) for seat in seats]
    return dialogue(*turns, **how)


def worth(credit: Credit) -> dict[tuple[str, str], tuple[float, ...]]:
    """By episode and seat."""
    found = {(s.trajectory.episode.id, s.trajectory.seat): s.advantages for s in credit.samples}
    assert len(found) == len(credit.samples)
    return found


# Of the seats' rewards, the means are 1 and 2, and 1.5 over both. The short seat alone speaks twice but once.
PAID = [paid(long=1, short=0), paid(long=0, short=3), paid(long=2, short=3)]
TALKS = ["LS", "LSLS", "LSL"]


@pytest.mark.parametrize(
    ("grouping", "long", "short", "groups", "single"),
    [
        ("seat", ((0,), (-1, -1), (1, 1)), ((-2,), (1, 1), (1,)), 2, 0),
        # Of their second turns, the long seat has two, in a group of their own, and the short seat one.
        ("turn", ((0,), (-1, -1), (1, 1)), ((-2,), (1, 0), (1,)), 4, 1),
        ("pooled", ((-0.5,), (-1.5, -1.5), (0.5, 0.5)), ((-1.5,), (1.5, 1.5), (1.5,)), 1, 0),
    ],
)
def test_groupings_of_a_dialogue_by_hand(
    dialogue: Dialogue, grouping: Grouping, long: tuple[tuple[float, ...], ...], short: tuple[tuple[float, ...], ...],
    groups: int, single: int,
) -> None:  # fmt: skip
    episodes = [talk(dialogue, seats, sample=sample) for sample, seats in enumerate(TALKS)]
    credit = assign_credit([episodes], [PAID], ("long", "short"), grouping=grouping)
    expected = {(f"p#{sample}", "long"): advantages for sample, advantages in enumerate(long)}
    expected |= {(f"p#{sample}", "short"): advantages for sample, advantages in enumerate(short)}
    assert worth(credit) == expected
    assert (credit.groups, credit.equal, credit.single) == (groups, 0, single)


@pytest.mark.parametrize(("grouping", "advantages"), [("seat", (0, -1, 1)), ("pooled", (-0.5, -1.5, 0.5))])
def test_a_policy_in_one_seat_has_that_seats_samples_only_and_the_pooled_baseline_is_still_that_of_all(
    dialogue: Dialogue, grouping: Grouping, advantages: tuple[float, ...]
) -> None:
    episodes = [talk(dialogue, "LS", sample=sample) for sample in range(3)]
    found = worth(assign_credit([episodes], [PAID], ("long",), grouping=grouping))
    assert found == {(f"p#{sample}", "long"): (advantage,) for sample, advantage in enumerate(advantages)}


def test_second_turns_have_a_baseline_of_their_own(dialogue: Dialogue) -> None:
    """Which is 3 here, where that of the first turns is 2."""
    episodes = [talk(dialogue, seats, sample=sample) for sample, seats in enumerate(("L", "LSL", "LSL"))]
    rewards = [paid(long=0, short=0), paid(long=1, short=0), paid(long=5, short=0)]
    credit = assign_credit([episodes], [rewards], ("long",), grouping="turn")
    assert worth(credit) == {("p#0", "long"): (-2,), ("p#1", "long"): (-1, -2), ("p#2", "long"): (3, 2)}


def test_turns_are_counted_through_all_sequences_of_an_episode(dialogue: Dialogue) -> None:
    """A seat that reads but the last turn says each of its turns in a sequence of its own."""
    episodes = [talk(dialogue, seats, sample=n, forgetful=True) for n, seats in enumerate(("L", "LSL", "LSL"))]
    rewards = [paid(long=0, short=0), paid(long=1, short=0), paid(long=5, short=0)]
    credit = assign_credit([episodes], [rewards], ("long",), grouping="turn")
    assert [sample.advantages for sample in credit.samples] == [(-2,), (-1,), (-2,), (3,), (2,)]
    assert [turn.place for sample in credit.samples for turn in sample.trajectory.turns] == [0, 0, 2, 0, 2]


def test_a_seat_that_did_not_speak_is_in_no_group(dialogue: Dialogue) -> None:
    """What it is paid for the silence moves no baseline: the mean is 2 here, and not 35."""
    episodes = [talk(dialogue, seats, sample=sample) for sample, seats in enumerate(("S", "LS", "LS"))]
    rewards = [paid(long=101, short=0), paid(long=1, short=0), paid(long=3, short=0)]
    credit = assign_credit([episodes], [rewards], ("long",))
    assert worth(credit) == {("p#1", "long"): (-1,), ("p#2", "long"): (1,)}
    pooled = assign_credit([episodes], [rewards], ("long",), grouping="pooled")
    assert worth(pooled) == {("p#1", "long"): (pytest.approx(0.2),), ("p#2", "long"): (pytest.approx(2.2),)}


def test_problems_are_groups_of_their_own_and_may_differ_in_size(dialogue: Dialogue) -> None:
    first = [talk(dialogue, "LS", sample=sample) for sample in range(2)]
    second = [talk(dialogue, "LS", sample=sample, problem="q") for sample in range(3)]
    rewards = [[paid(long=0), paid(long=1)], [paid(long=10), paid(long=10), paid(long=40)]]
    credit = assign_credit([first, second], rewards, ("long",), estimator="rloo")
    assert worth(credit) == {
        ("p#0", "long"): (-1,), ("p#1", "long"): (1,),
        ("q#0", "long"): (-15,), ("q#1", "long"): (-15,), ("q#2", "long"): (30,),
    }  # fmt: skip


@pytest.mark.parametrize("estimator", EVERY)
def test_credit_is_the_estimators(dialogue: Dialogue, estimator: Estimator) -> None:
    first = [talk(dialogue, "L", sample=sample) for sample in range(4)]
    second = [talk(dialogue, "L", sample=sample, problem="q") for sample in range(2)]
    rewards = [[paid(long=1), paid(long=0.5), paid(long=-1), paid(long=-1)], [paid(long=2), paid(long=4)]]
    found = worth(assign_credit([first, second], rewards, ("long",), estimator=estimator))
    expected = ESTIMATORS[estimator](floats(1, 0.5, -1, -1, 2, 4), numbers(0, 0, 0, 0, 1, 1))
    assert [advantage for (advantage,) in found.values()] == expected.tolist()


@pytest.mark.parametrize("estimator", EVERY)
def test_a_group_of_one_is_worth_nothing_and_counted(dialogue: Dialogue, estimator: Estimator) -> None:
    first, second = [talk(dialogue, "L", problem="q")], [talk(dialogue, "L", sample=sample) for sample in range(2)]
    rewards = [[paid(long=7)], [paid(long=0), paid(long=2)]]
    credit = assign_credit([first, second], rewards, ("long",), estimator=estimator)
    alone = assign_credit([second], rewards[1:], ("long",), estimator=estimator)
    assert worth(credit) == {("q#0", "long"): (0,), **worth(alone)}
    assert (credit.groups, credit.equal, credit.single) == (2, 0, 1)


def test_nothing_but_groups_of_one(dialogue: Dialogue) -> None:
    credit = assign_credit([[talk(dialogue, "L")]], [[paid(long=7)]], ("long",))
    assert worth(credit) == {("p#0", "long"): (0,)}
    assert (credit.groups, credit.equal, credit.single) == (1, 0, 1)


def test_no_episodes_no_credit() -> None:
    assert assign_credit([], [], ("long",)) == Credit((), 0, 0, 0)
    assert assign_credit([[]], [[]], ("long",)) == Credit((), 0, 0, 0)


@pytest.mark.parametrize("estimator", EVERY)
@pytest.mark.parametrize("reward", [0.8, 0.1, -1.0])
def test_equal_groups_are_worth_exactly_nothing_and_can_be_skipped(
    dialogue: Dialogue, estimator: Estimator, reward: float
) -> None:
    """Exactly: the mean of eight times 0.8 is 0.7999999999999999, and a token without an advantage costs no forward."""
    same = [talk(dialogue, "L", sample=sample) for sample in range(8)]
    other = [talk(dialogue, "L", sample=sample, problem="q") for sample in range(2)]
    rewards = [[paid(long=reward)] * 8, [paid(long=0), paid(long=2)]]
    credit = assign_credit([same, other], rewards, ("long",), estimator=estimator)
    assert [sample.advantages for sample in credit.samples[:8]] == [(0.0,)] * 8
    assert all(sample.advantages != (0.0,) for sample in credit.samples[8:])
    assert (credit.groups, credit.equal, credit.single) == (2, 1, 0)
    skipped = assign_credit([same, other], rewards, ("long",), estimator=estimator, skip_equal=True)
    assert skipped.samples == credit.samples[8:]
    assert (skipped.groups, skipped.equal, skipped.single) == (2, 1, 0)


def test_a_sequence_is_skipped_only_where_all_its_turns_are_of_equal_groups(dialogue: Dialogue) -> None:
    """The last two dialogues alone have second turns, and those are paid alike."""
    episodes = [talk(dialogue, seats, sample=sample) for sample, seats in enumerate(("L", "LSL", "LSL"))]
    rewards = [paid(long=0, short=4), paid(long=3, short=4), paid(long=3, short=4)]
    chosen = {"grouping": "turn", "skip_equal": True}
    credit = assign_credit([episodes], [rewards], ("long", "short"), **chosen)
    assert worth(credit) == {("p#0", "long"): (-2,), ("p#1", "long"): (1, 0), ("p#2", "long"): (1, 0)}
    assert (credit.groups, credit.equal, credit.single) == (3, 2, 0)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grouping", ["seat", "turn", "pooled"])
def test_a_reward_that_is_no_number_is_refused_by_seat_and_episode(
    dialogue: Dialogue, reward: float, grouping: Grouping
) -> None:
    episodes = [talk(dialogue, "LS", sample=sample, problem="q") for sample in range(2)]
    rewards: list[Mapping[str, Reward]] = [paid(long=0, short=1), paid(long=0, short=reward)]
    with pytest.raises(InputError, match=rf"finite number; seat 'short' was paid {reward} for 'q#1'"):
        assign_credit([episodes], [rewards], ("short",), grouping=grouping)


def test_the_fixture_of_thinkless_from_its_table(dialogue: Dialogue) -> None:
    """`<short>` and right, `<think>` and right, and two that are wrong."""
    chosen = (("<short>", True), ("<think>", True), ("<short>", False), ("<think>", False))
    group = [
        dialogue(("solver", "route", (7,), tag), ("solver", tag[1:-1], (8, 9)), sample=sample, right=right)
        for sample, (tag, right) in enumerate(chosen)
    ]
    protocol = Thinkless()
    rewards = protocol.rewards(group)
    assert [by_seat["solver"].total for by_seat in rewards] == [1, 0.5, -1, -1]
    credit = assign_credit([group], [rewards], protocol.seats)
    assert [sample.advantages for sample in credit.samples] == [
        (1.125, 1.125), (0.625, 0.625), (-0.875, -0.875), (-0.875, -0.875)
    ]  # fmt: skip


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(TypeCheckError, match="groups"):
        mean_centred(floats(1, 2, 3), numbers(0, 0))
    with pytest.raises(TypeCheckError, match="groups"):
        rloo(floats(1, 2), floats(0, 0))
