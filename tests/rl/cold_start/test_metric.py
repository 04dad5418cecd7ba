import random
from math import log
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.environments.errors import InputError
from turnwise.rl.cold_start.metric import (
    at_least,
    highest,
    hoeffding,
    misfires,
    probability_of_gain,
    random_scores,
    remains,
    score_errors,
    stays_long,
    thought_scores,
)

CHAINS = [
    (
        [100, 200, 100, 400, 200], [0.4, 0.8, 0.8, 1, 1],
        [0.404903, 0.534062, 0.268031, 0.163499, -0.25], [True, True, False, False, False],
    ),
    (
        [300, 50, 50, 300, 300], [0.2, 0.9, 0.9, 1, 1],
        [-0.115122, 0.637610, 0.347412, 0.275007, -0.25], [True, True, False, False, False],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("lengths", "success", "scores", "long"), CHAINS)
def test_chains_by_hand(lengths: list[int], success: list[float], scores: list[float], long: list[bool]) -> None:
    found = thought_scores(lengths, success, 0.2)
    assert found == pytest.approx(scores, abs=1e-6)
    assert stays_long(found) == long


rates = st.floats(0, 1)
thoughts = st.lists(st.tuples(st.integers(1, 5000), rates), min_size=1, max_size=20)


@given(chain=thoughts, before=rates)
def test_scores_lie_between_no_gain_and_one_and_the_last_thought_is_worth_nothing(
    chain: list[tuple[int, float]], before: float
) -> None:
    lengths, success = zip(*chain, strict=True)
    scores = thought_scores(lengths, success, before)
    assert all(-0.25 <= score < 1 for score in scores)
    assert scores[-1] <= 0
    assert stays_long(scores)[0]


@given(chain=thoughts, before=rates, data=st.data())
def test_more_success_is_never_worth_less(chain: list[tuple[int, float]], before: float, data: st.DataObject) -> None:
    lengths, success = zip(*chain, strict=True)
    place = data.draw(st.integers(0, len(success) - 1))
    better = list(success)
    better[place] = data.draw(st.floats(success[place], 1))
    assert thought_scores(lengths, better, before)[place] >= thought_scores(lengths, success, before)[place]


def test_a_record_must_be_beaten_and_not_met() -> None:
    assert stays_long([0.1, 0.1, 0.3, 0.2, 0.3, 0.4]) == [True, False, True, False, False, True]


@pytest.mark.parametrize(
    ("lengths", "success", "before", "fault"),
    [
        ([], [], 0.2, "at least 1 token"),
        ([10, 20], [0.5], 0.2, "2 lengths .* and 1 rates"),
        ([10, 0], [0.5, 0.5], 0.2, "at least 1 token"),
        ([10], [1.5], 0.2, r"must lie in \[0, 1\]"),
        ([10], [0.5], float("nan"), r"must lie in \[0, 1\]"),
    ],
)
def test_chains_that_cannot_be_scored(lengths: list[int], success: list[float], before: float, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        thought_scores(lengths, success, before)


# What may be put in the place of the metric and of the assignment


def test_at_least() -> None:
    assert at_least([-0.1, 0.2, 0.3, 0.1999, 0.5], 0.2) == [True, True, True, False, True]


def test_highest() -> None:
    scores = [-0.1, 0.2, 0.5, 0.2, 0.4]
    assert highest(scores, 0) == highest(scores, 1) == [True, False, False, False, False]
    assert highest(scores, 3) == [True, False, True, False, True]
    assert highest(scores, 4) == [True, True, True, False, True], "of two equals, the earlier"
    assert highest(scores, 5) == highest(scores, 9) == [True] * 5


@given(count=st.integers(0, 50), seed=st.text())
def test_random_scores_are_those_of_their_seed(count: int, seed: str) -> None:
    scores = random_scores(count, seed)
    assert len(scores) == count
    assert scores == random_scores(count, seed)
    assert all(-0.25 <= score <= 1 for score in scores)


def test_random_scores_are_uniform_and_the_same_everywhere() -> None:
    assert random_scores(2, "p1") == pytest.approx([0.807318, 0.556445], abs=1e-6)
    scores = random_scores(10_000, "p1")
    assert mean(scores) == pytest.approx(0.375, abs=0.02)
    assert [min(scores), max(scores)] == pytest.approx([-0.25, 1], abs=0.01)
    assert scores[0] != random_scores(1, "p2")[0]


# How far it can be trusted


@pytest.mark.parametrize(("samples", "error"), [(5, 0.607), (8, 0.480), (32, 0.240), (128, 0.120)])
def test_hoeffding(samples: int, error: float) -> None:
    assert hoeffding(samples) == pytest.approx(error, abs=5e-4)


def test_hoeffding_of_another_confidence() -> None:
    assert hoeffding(8, 0.5) == pytest.approx(0.294353, abs=1e-6)


@pytest.mark.parametrize(
    ("counts", "errors"),
    [
        # T1 T2 is 0.81, 0.56, 0.54, 0.12 and 0. Between 0 of 8 and 8 of 8 δ is sure; elsewhere it may have misfired.
        ([(0, 8), (8, 8), (8, 8), (0, 8), (0, 8), (1, 8)], [0.561108, 0.637927, 0.374072, 0.333127, 0.25]),
        # At 128, two shares that differ by more than 0.24 are told apart.
        (
            [(0, 128), (30, 128), (61, 128), (92, 128), (128, 128), (96, 128)],
            [0.390277, 0.096982, 0.093518, 0.020782, 0],
        ),
        # Not all prefixes are continued equally often: ε is that of each.
        ([(0, 8), (128, 128), (128, 128), (8, 8), (8, 8), (8, 8)], [0.140277, 0.346982, 0.624072, 0.333127, 0.25]),
    ],
)
def test_score_errors_by_hand(counts: list[tuple[int, int]], errors: list[float]) -> None:
    assert score_errors([100, 200, 100, 400, 200], counts) == pytest.approx(errors, abs=1e-6)


def simulated(rng: random.Random, samples: int) -> tuple[list[int], list[float], list[tuple[int, int]]]:
    """A chain of 8 to 16 thoughts whose true success wanders, and at half of them stays where it is.

    Its lengths, the true success after 0, 1, ... thoughts, and (right, drawn) of so many samples.
    """
    success = [rng.uniform(0, 0.6)]
    for _ in range(rng.randint(8, 16)):
        step = rng.gauss(0.1, 0.2) if rng.random() < 0.5 else 0
        success.append(min(1, max(0, success[-1] + step)))
    counts = [(sum(rng.random() < share for _ in range(samples)), samples) for share in success]
    return [rng.randint(50, 1500) for _ in success[1:]], success, counts


def test_the_bound_holds_where_the_papers_does_not() -> None:
    rng, ours, papers = random.Random(0), 0, 0
    for _ in range(2000):
        lengths, success, counts = simulated(rng, 8)
        shares = [right / drawn for right, drawn in counts]
        pairs = zip(
            thought_scores(lengths, shares[1:], shares[0]),
            thought_scores(lengths, success[1:], success[0]),
            strict=True,
        )
        off = [abs(found - true) for found, true in pairs]
        ours += all(far <= bound for far, bound in zip(off, score_errors(lengths, counts), strict=True))
        papers += all(far <= factor * hoeffding(8) / log(2) for far, factor in zip(off, remains(lengths), strict=True))
    assert ours >= 0.95 * 2000
    assert papers <= 0.25 * 2000


@pytest.mark.parametrize(
    ("before", "after", "probability"),
    [
        ((0, 0), (0, 0), 1 / 2),
        ((0, 1), (1, 1), 5 / 6),
        ((0, 1), (0, 0), 2 / 3),
        ((4, 8), (4, 8), 1 / 2),
        ((0, 8), (8, 8), 1 - 1 / 48620),
        ((3, 8), (5, 8), 0.826532),
        ((60, 128), (5, 8), 0.794900),
    ],
)
def test_probability_of_gain_by_hand(before: tuple[int, int], after: tuple[int, int], probability: float) -> None:
    assert probability_of_gain(*before, *after) == pytest.approx(probability, abs=1e-6)


counted = st.integers(0, 150).flatmap(lambda drawn: st.tuples(st.integers(0, drawn), st.just(drawn)))


@given(before=counted, after=counted)
def test_one_of_two_shares_is_the_higher(before: tuple[int, int], after: tuple[int, int]) -> None:
    gain = probability_of_gain(*before, *after)
    assert 0 <= gain <= 1
    assert gain == pytest.approx(1 - probability_of_gain(*after, *before), abs=1e-9)
    (right_before, drawn_before), (right, drawn) = before, after
    turned = probability_of_gain(drawn - right, drawn, drawn_before - right_before, drawn_before)
    assert gain == pytest.approx(turned, abs=1e-9), "a gain in right ones is a loss in wrong ones"


@pytest.mark.parametrize(
    ("before", "after"), [((1, 8), (2, 8)), ((40, 128), (5, 8)), ((2, 5), (5, 5)), ((0, 3), (9, 40))]
)
def test_probability_of_gain_is_what_simulation_finds(before: tuple[int, int], after: tuple[int, int]) -> None:
    rng = random.Random(0)

    def share(right: int, drawn: int) -> float:
        return rng.betavariate(right + 1, drawn - right + 1)

    gains = mean(share(*after) > share(*before) for _ in range(20_000))
    assert probability_of_gain(*before, *after) == pytest.approx(gains, abs=0.015)


def test_misfires_by_hand() -> None:
    # A gain, a loss and a tie.
    assert misfires([(0, 1), (1, 1), (0, 1), (0, 1)]) == pytest.approx([1 / 6, 1 / 6, 1 / 2])
    assert misfires([(2, 8), (1, 4)]) == pytest.approx([6 / 11])
    assert misfires([(8, 8), (0, 8)]) == pytest.approx([1 / 48620])
    assert misfires([(5, 8), (60, 128)]) == pytest.approx([0.205100], abs=1e-6)


@given(drawn=st.integers(1, 130), data=st.data())
def test_of_equally_many_samples_the_shares_are_likelier_right_than_wrong(drawn: int, data: st.DataObject) -> None:
    rights = data.draw(st.lists(st.integers(0, drawn), min_size=2, max_size=6))
    found = misfires([(right, drawn) for right in rights])
    assert len(found) == len(rights) - 1
    assert all(0 <= chance <= 0.5 + 1e-9 for chance in found)
