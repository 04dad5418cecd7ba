import json
from statistics import fmean

import orjson
import pytest

from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.rl.summary import Summary, accuracy_efficiency_score, by_level, record, summarise, wilson


def step(seat: str, tokens: int, *, stop: str | None = None, prefill: str = "") -> Step:
    return Step(seat, "state", Reply("text", tokens, "stop" if stop else "end", stop), prefill)


def episode(*steps: Step, outcome: Outcome | None = Outcome.RIGHT, level: int = 1) -> Episode:
    transcript = Transcript(Problem("p", "1 + 1?", "2", level=level), steps)
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


# Long⊗Short, table 1: MATH500, AIME24, AIME25, GPQA-Diamond, AMC23, mean length, and the AES as printed.
QWEN = ((93.40, 53.33, 36.67, 48.98, 95.00), 24566)
LLAMA = ((87.20, 43.33, 30.00, 49.49, 90.00), 28496)
PRINTED = [
    ("Qwen long only", QWEN, *QWEN, 0.0),
    ("Qwen base", QWEN, (74.80, 16.67, 7.25, 37.88, 42.50), 1623, -1.33),
    ("Qwen r0⊗r0", QWEN, (80.40, 26.67, 13.33, 44.44, 67.50), 7323, -0.75),
    ("Qwen r1⊗r0", QWEN, (84.60, 36.67, 23.33, 45.45, 72.50), 2169, -0.08),
    ("Qwen r2⊗r0", QWEN, (87.60, 43.33, 26.67, 46.46, 85.00), 2331, 0.32),
    ("Qwen r2⊗r1", QWEN, (87.00, 33.33, 26.67, 45.96, 82.50), 2021, 0.12),
    ("Qwen r3⊗r1", QWEN, (88.60, 43.33, 30.00, 46.96, 87.50), 2457, 0.43),
    ("Qwen r3⊗r2", QWEN, (87.80, 43.33, 26.67, 46.96, 87.50), 2116, 0.38),
    ("Qwen r4⊗r2", QWEN, (89.80, 46.67, 33.33, 47.97, 90.00), 2113, 0.61),
    ("Llama long only", LLAMA, *LLAMA, 0.0),
    ("Llama base", LLAMA, (62.80, 10.00, 6.67, 35.86, 22.50), 3713, -1.83),
    ("Llama r0⊗r0", LLAMA, (73.40, 23.33, 16.67, 40.40, 47.50), 6611, -0.88),
    # Printed 0.81: the one figure that the paper cut off instead of rounding it.
    ("Llama r4⊗r2", LLAMA, (86.20, 40.00, 33.33, 46.96, 87.50), 2402, 0.8152),
]


class TestAccuracyEfficiencyScore:
    @pytest.mark.parametrize(
        ("base", "accuracies", "length", "score"), [row[1:] for row in PRINTED], ids=[row[0] for row in PRINTED]
    )
    def test_the_papers_table(
        self,
        base: tuple[tuple[float, ...], int],
        accuracies: tuple[float, ...],
        length: int,
        score: float,
    ) -> None:
        got = accuracy_efficiency_score(fmean(accuracies), length, base_accuracy=fmean(base[0]), base_tokens=base[1])
        assert got == pytest.approx(score, abs=0.005)

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
