import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.rl.cold_start.metric import stays_long, thought_scores
from turnwise.rl.cold_start.rollouts import RolloutSettings
from turnwise.rl.cold_start.stopping import final_share, open_prefixes

CERTAIN = 1e9
"""So many standard deviations that only what is impossible is ruled out."""


# Where a share will lie


@pytest.mark.parametrize(
    ("right", "drawn", "samples", "z", "low", "high"),
    [
        (0, 0, 8, 1.28, 0, 1),
        (4, 8, 10**12, 1.959964, 0.215216, 0.784784),  # Wilson's interval itself
        (0, 10, 10**12, 1.959964, 0, 0.277533),
        (4, 8, 128, 1.28, 0.299330, 0.700670),
        (4, 8, 12, 1.28, 0.373604, 0.626396),
        (4, 8, 10, 1.28, 0.400818, 0.599182),
        (4, 8, 10, 3.0, 0.4, 0.6),  # two more may both be wrong, or both right
        (7, 8, 16, 1.28, 0.733523, 0.9375),  # no more than 15 of 16
        (8, 8, 16, 1.28, 0.907112, 1),
        (5, 8, 8, 1.28, 0.625, 0.625),
    ],
)
def test_final_share_by_hand(right: int, drawn: int, samples: int, z: float, low: float, high: float) -> None:
    assert final_share(right, drawn, samples, z) == pytest.approx((low, high), abs=1e-6)


@st.composite
def partly_drawn(draw: st.DrawFn) -> tuple[int, int, int]:
    """Right, drawn, samples."""
    samples = draw(st.integers(1, 200))
    drawn = draw(st.integers(0, samples))
    return draw(st.integers(0, drawn)), drawn, samples


deviations = st.floats(0.01, 100)


@given(partly_drawn(), deviations)
def test_the_final_share_lies_about_the_current_one_and_among_what_is_possible(
    counts: tuple[int, int, int], z: float
) -> None:
    right, drawn, samples = counts
    low, high = final_share(right, drawn, samples, z)
    assert right / samples <= low
    assert high <= (right + samples - drawn) / samples
    if drawn:
        assert low - 1e-12 <= right / drawn <= high + 1e-12


@given(partly_drawn(), deviations, st.floats(1, 10))
def test_more_deviations_are_a_wider_range(counts: tuple[int, int, int], z: float, times: float) -> None:
    (low, high), (lower, higher) = final_share(*counts, z), final_share(*counts, z * times)
    assert lower <= low + 1e-12
    assert high <= higher + 1e-12


@given(partly_drawn(), deviations)
def test_once_all_are_drawn_the_final_share_is_the_share(counts: tuple[int, int, int], z: float) -> None:
    right, _, samples = counts
    assert final_share(right, samples, samples, z) == (right / samples, right / samples)


@given(partly_drawn(), deviations)
def test_wrong_ones_are_as_right_ones(counts: tuple[int, int, int], z: float) -> None:
    right, drawn, samples = counts
    low, high = final_share(drawn - right, drawn, samples, z)
    assert final_share(right, drawn, samples, z) == pytest.approx((1 - high, 1 - low), abs=1e-9)


# Which prefixes stay open


@pytest.mark.parametrize(
    ("lengths", "counts", "expected"),
    [
        ([100, 100, 300], [(0, 0)] * 4, {0, 1, 2, 3}),
        ([100, 100, 300], [(8, 64), (32, 64), (36, 64), (50, 64)], set()),  # all is drawn
        # The second is so long that it scores far less than the first; the last is worth 0 at the most.
        ([100, 600, 300], [(0, 32), (32, 32), (20, 32), (32, 32)], set()),
        # Whether the second gains on the first is open, and whether it is the record. The first gained surely.
        ([100, 100, 300], [(0, 32), (10, 32), (14, 32), (32, 32)], {1, 2}),
        # Now it surely gains, too, but may still be less than the first. Three more right ones, and it is the record.
        ([100, 100, 300], [(0, 32), (10, 32), (18, 32), (32, 32)], {1, 2}),
        ([100, 100, 300], [(0, 32), (10, 32), (21, 32), (32, 32)], set()),
        # Whether the first gained is open: if not, then the last may be the record, with the 0 that it is worth.
        ([100, 100, 300], [(9, 32), (10, 32), (14, 32), (32, 32)], {0, 1, 2, 3}),
        # The first stays long in any case, but what it scores may be more or less than what the second surely does.
        ([100, 100, 300], [(0, 64), (15, 48), (26, 64), (64, 64)], {1}),
        # None gained surely, and to meet what the first has at the least is no record.
        ([100, 100], [(0, 32), (0, 32), (0, 64)], set()),
        # The second may still gain, or else meet the first.
        ([100, 100], [(3, 64), (0, 64), (0, 32)], {2}),
        # What has been drawn in full is left alone.
        ([100, 100, 300], [(9, 32), (20, 64), (14, 32), (64, 64)], {0, 2}),
    ],
)
def test_open_prefixes_by_hand(lengths: list[int], counts: list[tuple[int, int]], expected: set[int]) -> None:
    assert open_prefixes(lengths, counts, 64, z=1.28) == expected


Outcomes = list[list[bool]]
"""Of each prefix, from that of no thought, how its continuations end."""


def drawn_in_turn(
    lengths: list[int], outcomes: Outcomes, batch: int, z: float, first: list[int] | None = None
) -> list[tuple[int, int]]:
    """(right, drawn) of each prefix once none is open, where so many samples, by default none, were drawn at first."""
    samples = len(outcomes[0])
    counts = [(sum(ends[:most]), most) for ends, most in zip(outcomes, first or [0] * len(outcomes), strict=True)]
    while needed := open_prefixes(lengths, counts, samples, z=z):
        for prefix in needed:
            most = min(samples, counts[prefix][1] + batch)
            assert most > counts[prefix][1], "it is drawn in full"
            counts[prefix] = sum(outcomes[prefix][:most]), most
    return counts


def assigned(lengths: list[int], counts: list[tuple[int, int]]) -> list[bool]:
    # A prefix that never was open has no share of its own; any would do.
    before, *shares = [right / drawn if drawn else 0.5 for right, drawn in counts]
    return stays_long(thought_scores(lengths, shares, before))


@st.composite
def outcomes_of_chains(draw: st.DrawFn) -> tuple[list[int], Outcomes]:
    """Lengths, and outcomes that mostly are those of the prefix before, so that gains and records are close."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=2, max_size=7))
    samples = draw(st.integers(1, 9))
    outcomes: Outcomes = [draw(st.lists(st.booleans(), min_size=samples, max_size=samples))]
    for _ in lengths:
        kept = outcomes[-1][: draw(st.integers(0, samples))]
        rest = samples - len(kept)
        outcomes.append(kept + draw(st.lists(st.booleans(), min_size=rest, max_size=rest)))
    return lengths, outcomes


@settings(max_examples=500)
@given(chain=outcomes_of_chains(), batch=st.integers(1, 3), data=st.data())
def test_without_a_risk_every_thought_is_assigned_as_with_all_samples(
    chain: tuple[list[int], Outcomes], batch: int, data: st.DataObject
) -> None:
    lengths, outcomes = chain
    first = [data.draw(st.integers(0, len(ends))) for ends in outcomes]
    counts = drawn_in_turn(lengths, outcomes, batch, CERTAIN, first)
    everything = [(sum(ends), len(ends)) for ends in outcomes]
    assert assigned(lengths, counts) == assigned(lengths, everything)


@given(chain=outcomes_of_chains(), z=st.floats(0.1, 5), data=st.data())
def test_what_is_drawn_in_full_is_not_open(chain: tuple[list[int], Outcomes], z: float, data: st.DataObject) -> None:
    lengths, outcomes = chain
    samples = len(outcomes[0])
    counts = [(sum(ends[:most]), most) for ends in outcomes for most in [data.draw(st.integers(0, samples))]]
    needed = open_prefixes(lengths, counts, samples, z=z)
    assert all(counts[prefix][1] < samples for prefix in needed)
    assert open_prefixes(lengths, [(sum(ends), samples) for ends in outcomes], samples, z=z) == set()


# What it saves, and what it costs


def leaps(rng: random.Random, thoughts: int) -> list[float]:
    """Success that stays where it is, but for two thoughts or three that matter."""
    places = set(rng.sample(range(thoughts), rng.randint(2, 3)))
    shares = [rng.uniform(0, 0.3)]
    for place in range(thoughts):
        shares.append(min(1, shares[-1] + rng.uniform(0.2, 0.4)) if place in places else shares[-1])
    return shares


def wanders(rng: random.Random, thoughts: int) -> list[float]:
    """Success that goes up and down, and at half of the thoughts stays where it is."""
    shares = [rng.uniform(0, 0.6)]
    for _ in range(thoughts):
        shares.append(min(1, max(0, shares[-1] + (rng.gauss(0.1, 0.2) if rng.random() < 0.5 else 0))))
    return shares


def rises(rng: random.Random, thoughts: int) -> list[float]:
    """Success that rises evenly, by a little at each thought."""
    first, last = rng.uniform(0, 0.3), rng.uniform(0.7, 1)
    return [first + (last - first) * place / thoughts for place in range(thoughts + 1)]


@pytest.mark.parametrize("kind", [leaps, wanders, rises])
def test_fewer_samples_assign_nearly_all_thoughts_as_all_samples_do(
    kind: Callable[[random.Random, int], list[float]],
) -> None:
    rng, z = random.Random(0), RolloutSettings().z
    same, thoughts, drawn, most = 0, 0, 0, 0
    for _ in range(300):
        lengths = [rng.randint(50, 1500) for _ in range(rng.randint(8, 16))]
        outcomes = [[rng.random() < success for _ in range(128)] for success in kind(rng, len(lengths))]
        counts = drawn_in_turn(lengths, outcomes, 8, z)
        everything = [(sum(ends), 128) for ends in outcomes]
        same += sum(map(bool.__eq__, assigned(lengths, counts), assigned(lengths, everything)))
        thoughts += len(lengths)
        drawn += sum(taken for _, taken in counts)
        most += 128 * len(outcomes)
    assert same >= 0.97 * thoughts
    assert drawn <= most / 2
