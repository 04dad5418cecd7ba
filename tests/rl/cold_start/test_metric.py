import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.environments.errors import InputError
from turnwise.rl.cold_start.metric import stays_long, thought_scores

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
