import json
from itertools import count

import numpy as np
import orjson
import pytest

from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.rl.summary import (
    Summary,
    accuracy_efficiency_score,
    by_level,
    over_problems,
    record,
    summarise,
    wilson,
)

NUMBERS = count()


def step(seat: str, tokens: int, *, stop: str | None = None, prefill: str = "") -> Step:
    return Step(seat, "state", Reply("text", tokens, "stop" if stop else "end", stop), prefill)


def episode(
    *steps: Step, outcome: Outcome | None = Outcome.RIGHT, level: int = 1, problem: str | None = None
) -> Episode:
    """One of a problem of its own, unless one is named."""
    transcript = Transcript(Problem(problem or f"p{next(NUMBERS)}", "1 + 1?", "2", level=level), steps)
    return Episode(transcript, 0, 0, Grade(outcome) if outcome else None, None if outcome else "KeyError: 'x'")


class TestWilson:
    @pytest.mark.parametrize(
        ("successes", "trials", "low", "high"),
        [
            (8, 10, 0.4902, 0.9433),
            (0, 10, 0.0, 0.2775),
            (10, 10, 0.7225, 1.0),
            (50, 100, 0.4038, 0.5962),
            # Newcombe 1998, table I, method 3.
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ],
    )
    def test_published_values(self, successes: int, trials: int, low: float, high: float) -> None:
        assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)

    def test_it_is_symmetric_within_bounds_and_around_the_share(self) -> None:
        for trials in (1, 2, 7, 500):
            for successes in range(trials + 1):
                low, high = wilson(successes, trials)
                assert 0.0 <= low <= successes / trials + 1e-12
                assert successes / trials - 1e-12 <= high <= 1.0
                assert wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low))

    def test_another_level_of_confidence(self) -> None:
        assert wilson(8, 10, z=0.0) == pytest.approx((0.8, 0.8))
        # 90%.
        assert wilson(8, 10, z=1.644854) == pytest.approx((0.5408, 0.9314), abs=5e-5)


def sampled(*rights: tuple[int, int]) -> list[Episode]:
    """Of each problem so many samples, of which so many are right."""
    return [
        episode(problem=f"p{problem}", outcome=Outcome.RIGHT if sample < right else Outcome.WRONG)
        for problem, (samples, right) in enumerate(rights)
        for sample in range(samples)
    ]


class TestOverProblems:
    def test_of_one_sample_each_it_is_wilsons(self) -> None:
        assert over_problems(sampled((1, 1), (1, 0), (1, 1))) == wilson(2, 3)

    def test_samples_that_agree_tell_no_more_than_one(self) -> None:
        # s² = 0.25 / (G − 1), so that n = G − 1.
        assert over_problems(sampled(*[(8, 8), (8, 0)] * 24)) == pytest.approx(wilson(23.5, 47))
        assert over_problems(sampled(*[(8, 8)] * 48)) == wilson(48, 48)
        assert over_problems(sampled((8, 3))) == pytest.approx(wilson(3 / 8, 1))

    def test_by_hand(self) -> None:
        # p = 6/10, and s² = 3/2 · (0.2² · 0.6² + 0.4² · 0.4² + 0.4² · 0.1²) = 0.0624
        trials = 0.24 / 0.0624
        assert over_problems(sampled((2, 0), (4, 4), (4, 2))) == pytest.approx(wilson(0.6 * trials, trials))
        # s² = 3/2 · (0.1² · 0.6² + 0.4² · 0.15²) = 0.01: as of 24, but no more than 10 were drawn.
        assert over_problems(sampled((1, 0), (4, 3), (5, 3))) == pytest.approx(wilson(6, 10))

    def test_it_covers_the_truth_as_often_as_it_says(self) -> None:
        rng = np.random.default_rng(0)
        found = []
        for _ in range(250):
            rights = rng.binomial(8, rng.beta(0.5, 0.5, size=20)).tolist()
            low, high = over_problems(sampled(*((8, right) for right in rights)))
            found.append((low <= 0.5 <= high, wilson(sum(rights), 160)[0] <= 0.5 <= wilson(sum(rights), 160)[1]))
        hits, naive = np.mean(found, axis=0)
        assert 0.92 <= hits <= 0.98
        assert naive < 0.75


class TestAccuracyEfficiencyScore:  # the papers' own are in tests/analysis/test_papers.py
    @pytest.mark.parametrize(
        ("accuracy", "tokens", "score"),
        [
            (0.5, 100, 0.0),
            (0.5, 25, 0.75),
            (0.5, 300, -2.0),
            # A gain of a fifth counts three times, a loss of a fifth five times.
            (0.6, 100, 0.6),
            (0.4, 100, -1.0),
            (0.4, 50, -0.5),
        ],
    )
    def test_by_hand(self, accuracy: float, tokens: float, score: float) -> None:
        got = accuracy_efficiency_score(accuracy, tokens, base_accuracy=0.5, base_tokens=100)
        assert got == pytest.approx(score)
        arrays = accuracy_efficiency_score(
            np.array([accuracy]),
            np.array([float(tokens)]),
            base_accuracy=np.array([0.5]),
            base_tokens=np.array([100.0]),
        )
        assert arrays.tolist() == [got]


class TestSummary:
    def test_by_hand(self) -> None:
        episodes = [
            episode(step("long", 10), step("short", 2), step("long", 4), step("short", 1)),
            episode(step("long", 20), step("short", 3), outcome=Outcome.WRONG),
            episode(step("long", 5), outcome=Outcome.UNPARSABLE),
            episode(step("long", 1), step("short", 2), outcome=Outcome.TIMED_OUT),
        ]
        assert summarise(episodes) == Summary(
            episodes=4,
            failed=0,
            accuracy=0.25,
            interval=wilson(1, 4),
            tokens=(17 + 23 + 5 + 3) / 4,
            seat_tokens={"long": 10.0, "short": 2.0},
            turns=9 / 4,
            think_share=None,
            outcomes={Outcome.RIGHT: 1, Outcome.WRONG: 1, Outcome.UNPARSABLE: 1, Outcome.TIMED_OUT: 1},
        )

    def test_failed_episodes_are_counted_and_nothing_else_of_them(self) -> None:
        fine = [episode(step("a", 10)), episode(step("a", 20), outcome=Outcome.WRONG)]
        failed = [episode(step("a", 1000), step("b", 1000, stop="<think>"), outcome=None)] * 3
        with_failed, without = summarise(failed + fine), summarise(fine)
        assert with_failed.failed == 3
        assert without.failed == 0
        assert (with_failed.episodes, with_failed.tokens, with_failed.turns) == (2, 15.0, 1.0)
        assert with_failed.seat_tokens == {"a": 15.0}
        assert with_failed.outcomes == without.outcomes == {Outcome.RIGHT: 1, Outcome.WRONG: 1}

    def test_the_think_share_is_that_of_the_modes_which_were_chosen(self) -> None:
        think, short = step("solver", 1, stop="<think>"), step("solver", 1, stop="<short>")
        forced, none = step("solver", 9, prefill="<think>"), step("solver", 1)
        long = step("solver", 50)
        assert summarise([episode(think, long), episode(short, long), episode(short, long)]).think_share == 1 / 3
        assert summarise([episode(think, long), episode(short), episode(none)]).think_share == 0.5
        assert summarise([episode(forced), episode(forced)]).think_share == 1.0
        assert summarise([episode(short, step("solver", 3, stop="<think>"))]).think_share == 0.0
        assert summarise([episode(none)]).think_share is None

    def test_an_iterator_will_do(self) -> None:
        assert summarise(episode(step("a", tokens)) for tokens in (1, 2, 3)).tokens == 2.0

    def test_there_must_be_an_episode_that_finished(self) -> None:
        with pytest.raises(ValueError, match="at least one finished episode; all of the 0 given failed"):
            summarise([])
        with pytest.raises(ValueError, match="all of the 2 given failed"):
            summarise([episode(outcome=None)] * 2)


class TestLevels:
    def test_each_level_by_itself_in_order(self) -> None:
        episodes = [
            episode(step("a", 30), level=3, outcome=Outcome.WRONG),
            episode(step("a", 10), level=1),
            episode(step("a", 20), level=1, outcome=Outcome.WRONG),
        ]
        levels = by_level(episodes)
        assert list(levels) == [1, 3]
        assert (levels[1].episodes, levels[1].accuracy, levels[1].tokens) == (2, 0.5, 15.0)
        assert (levels[3].episodes, levels[3].accuracy, levels[3].tokens) == (1, 0.0, 30.0)

    def test_a_level_of_which_no_episode_finished_is_left_out(self) -> None:
        levels = by_level([episode(level=2), episode(level=1, outcome=None)])
        assert list(levels) == [2]
        assert levels[2].failed == 0
        assert by_level([]) == {}


class TestRecord:
    def test_it_is_what_json_can_hold_over_all_and_by_level(self) -> None:
        think, short = step("solver", 1, stop="<think>"), step("solver", 1, stop="<short>")
        episodes = [
            episode(think, step("solver", 9)),
            episode(short, step("solver", 3), outcome=Outcome.TIMED_OUT),
            episode(short, step("solver", 4), level=12),
            episode(level=12, outcome=None),
        ]
        low, high = wilson(2, 3)
        half = list(wilson(1, 2))
        assert json.loads(orjson.dumps(record(episodes))) == {
            "episodes": 3, "failed": 1, "accuracy": 2 / 3, "interval": [low, high], "tokens": 19 / 3,
            "seat_tokens": {"solver": 19 / 3}, "turns": 2.0, "think_share": 1 / 3,
            "outcomes": {"right": 2, "timed out": 1},
            "levels": {
                "1": {
                    "episodes": 2, "failed": 0, "accuracy": 0.5, "interval": half, "tokens": 7.0,
                    "seat_tokens": {"solver": 7.0}, "turns": 2.0, "think_share": 0.5,
                    "outcomes": {"right": 1, "timed out": 1},
                },
                "12": {
                    "episodes": 1, "failed": 1, "accuracy": 1.0, "interval": list(wilson(1, 1)), "tokens": 5.0,
                    "seat_tokens": {"solver": 5.0}, "turns": 2.0, "think_share": 0.0, "outcomes": {"right": 1},
                },
            },
        }  # fmt: skip
