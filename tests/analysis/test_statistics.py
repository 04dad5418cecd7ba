from itertools import combinations
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from turnwise.analysis.statistics import Estimate, bootstrap, change, pass_at
from turnwise.rl.summary import wilson

Array = NDArray[np.float64]


def mean(sums: Array) -> Array:
    return sums[..., 0] / sums[..., 1]


class TestPassAt:
    @pytest.mark.parametrize(
        ("k", "samples", "right", "expected"),
        [
            (1, 10, 3, 0.3),
            (2, 4, 1, 0.5),
            (2, 4, 2, 5 / 6),
            (5, 10, 3, 1 - 21 / 252),
            (3, 3, 1, 1.0),
            (4, 8, 0, 0.0),
            (100, 200, 1, 0.5),
            (64, 1000, 10, 0.4855),  # 1 - C(990, 64) / C(1000, 64)
        ],
    )
    def test_by_hand(self, k: int, samples: int, right: int, expected: float) -> None:
        assert pass_at(k, samples, right) == pytest.approx(expected, abs=5e-5)

    @given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n), st.integers(0, n))))
    def test_it_is_the_share_of_all_draws_that_hold_a_right_sample(self, drawn: tuple[int, int, int]) -> None:
        k, samples, right = drawn
        draws = list(combinations(range(samples), k))
        assert pass_at(k, samples, right) == pytest.approx(sum(min(draw) < right for draw in draws) / len(draws))

    @given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n), st.integers(0, n))))
    def test_it_is_the_product_of_the_papers_code(self, drawn: tuple[int, int, int]) -> None:
        k, n, c = drawn
        product = 1.0 if n - c < k else 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))
        assert pass_at(k, n, c) == pytest.approx(product, abs=1e-9)

    def test_it_is_unbiased(self) -> None:
        # Over all that 6 samples of a problem that is solved with chance 0.3 can come to, the mean is 1 - 0.7 ** k.
        for k in range(1, 7):
            chances = [
                pass_at(k, 6, c) * len(list(combinations(range(6), c))) * 0.3**c * 0.7 ** (6 - c) for c in range(7)
            ]
            assert sum(chances) == pytest.approx(1 - 0.7**k)

    @pytest.mark.parametrize(("k", "samples", "right"), [(0, 4, 1), (5, 4, 1), (1, 4, 5), (1, 4, -1), (1, 0, 0)])
    def test_what_there_is_not(self, k: int, samples: int, right: int) -> None:
        with pytest.raises(ValueError, match="pass@k needs"):
            pass_at(k, samples, right)


class TestBootstrap:
    def test_literal_numbers(self) -> None:
        group = np.array([[1.0, 1], [0.0, 1], [0.5, 1], [1.0, 1], [0.25, 1], [0.75, 1], [0.0, 1], [1.0, 1]])
        first, again = (bootstrap(mean, group, seed=3) for _ in range(2))
        assert first == again
        assert (first.value, first.low, first.high) == pytest.approx((0.5625, 0.1875, 0.875), abs=1e-9)
        assert bootstrap(mean, group, seed=3, resamples=50) != first

    def test_it_is_as_wide_as_students_interval(self) -> None:
        for problems in (20, 40, 400):
            values = np.random.default_rng(problems).normal(size=problems)
            found = bootstrap(mean, np.column_stack([values, np.ones(problems)]), resamples=40_000)
            student = {20: 2.0930, 40: 2.0227, 400: 1.9659}[problems] * values.std(ddof=1) / problems**0.5
            assert (found.high - found.low) / 2 == pytest.approx(student, rel=0.04)

    def test_samples_stay_with_their_problem(self) -> None:
        # Four samples that agree tell no more than one.
        one = np.array([[float(right), 1.0] for right in (1, 0, 1, 1, 0, 0, 1, 0)])
        assert bootstrap(mean, 4 * one) == bootstrap(mean, one)

    def test_what_was_met_by_both_is_drawn_together(self) -> None:
        rng = np.random.default_rng(0)
        hard = rng.random(200)
        ours, theirs = hard + 0.1 + 0.01 * rng.normal(size=200), hard
        both = np.column_stack([ours, theirs, np.ones(200)])
        paired = bootstrap(lambda t: (t[..., 0] - t[..., 1]) / t[..., 2], both)
        assert paired.value == pytest.approx((ours - theirs).mean())
        assert paired.high - paired.low == pytest.approx(2 * 1.97 * (ours - theirs).std(ddof=1) / 200**0.5, rel=0.06)
        # Two independent means would be 30 times as uncertain.
        assert paired.high - paired.low < 0.004

    def test_resamples_without_a_figure_are_left_out(self) -> None:
        group = np.array([[9.0, 1], [9.0, 0]])  # tokens, right
        found = bootstrap(lambda t: t[..., 0] / t[..., 1], group)
        assert found == Estimate(18.0, 9.0, 18.0)
        assert bootstrap(lambda t: t[..., 0] / t[..., 1], np.array([[9.0, 0]])) == Estimate(inf, inf, inf)

    def test_one_problem_tells_nothing_of_others(self) -> None:
        assert bootstrap(mean, np.array([[0.5, 1.0]])) == Estimate(0.5, 0.5, 0.5)
        with pytest.raises(ValueError, match="at least one problem"):
            bootstrap(mean, np.empty((0, 2)))

    @pytest.mark.parametrize(("problems", "samples"), [(30, 4), (80, 1), (80, 4)])
    def test_intervals_cover_the_truth_as_often_as_they_say(self, problems: int, samples: int) -> None:
        """Accuracy, the difference of two teams on the same problems, and tokens per right answer; 500 times each.

        Problems are as hard as a beta distribution has it, and the harder, the longer: the samples of one are alike.
        """
        runs, rng = 500, np.random.default_rng(problems + samples)
        hits = np.zeros(3)
        for run in range(runs):
            chance = rng.beta(2, 1, size=problems)
            ours = rng.binomial(samples, chance) / samples
            theirs = rng.binomial(samples, chance**2) / samples
            tokens = rng.poisson(100 * (2 - chance)[:, None], size=(problems, samples)).mean(axis=1)
            group = np.column_stack([ours, theirs, tokens, np.ones(problems)])
            found = (
                bootstrap(lambda t: t[..., 0] / t[..., 3], group, seed=run, resamples=400),
                bootstrap(lambda t: (t[..., 0] - t[..., 1]) / t[..., 3], group, seed=run, resamples=400),
                bootstrap(lambda t: t[..., 2] / t[..., 0], group, seed=run, resamples=400),
            )
            # E p = 2/3, E p² = 1/2, E tokens = 100 (2 - 2/3)
            hits += [one.low <= true <= one.high for one, true in zip(found, (2 / 3, 1 / 6, 200), strict=True)]
        assert ((hits / runs >= 0.93) & (hits / runs <= 0.97)).all(), hits / runs


class TestChange:
    def test_it_is_the_paired_bootstrap(self) -> None:
        ours, theirs = np.array([1.0, 1.0, 0.5, 0.0] * 5), np.array([1.0, 0.0, 0.5, 0.5] * 5)
        apart = np.column_stack([ours - theirs, np.ones(20)])
        assert change(ours, theirs) == bootstrap(mean, apart)
        assert change(ours, theirs).value == 0.125

    @pytest.mark.parametrize("same", [-1.0, 0.0, 0.25, 1.0])
    def test_the_same_on_all_problems_may_be_another_on_others(self, same: float) -> None:
        found = change(np.full(10, max(same, 0.0)), np.full(10, max(-same, 0.0)))
        others = wilson(0, 10)[1]
        # On the share `others` of problems anything from -1 to 1.
        ends = [(1 - others) * same + others * end for end in (-1, 1)]
        assert (found.value, found.low, found.high) == (same, pytest.approx(ends[0]), pytest.approx(ends[1]))
