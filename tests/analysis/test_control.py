from statistics import fmean
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.analysis.control import (
    SUBSETS,
    Control,
    at_all_budgets,
    by_problem,
    cut_short,
    for_same_tokens,
    majority,
    mixed,
    voting,
)
from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.rl.summary import over_problems

RIGHT, WRONG = "2", "3"


def episode(tokens: int, answer: str | None = RIGHT, *, problem: str = "p", sample: int = 0) -> Episode:
    """It answers; the right answer is 2, and 2.0 is right as well."""
    transcript = Transcript(Problem(problem, "1 + 1?", "2"), (Step("solver", "solve", Reply("", tokens)),))
    outcome = Outcome.UNPARSABLE if answer is None else Outcome.RIGHT if answer in ("2", "2.0") else Outcome.WRONG
    return Episode(transcript, sample, 0, Grade(outcome, answer))


def test_the_graded_episodes_of_each_problem_by_sample() -> None:
    failed = Episode(Transcript(Problem("p", "1 + 1?", "2")), 0, 0, error="KeyError: 'x'")
    last, first, other = episode(1, sample=2), episode(2, sample=1), episode(3, problem="q")
    assert by_problem([last, other, failed, first]) == [[other], [first, last]]
    assert by_problem([failed]) == []


class TestCutShort:
    @pytest.mark.parametrize(
        ("tokens", "accuracy", "spent"),
        [
            # Of 2, 10 and 10 tokens, of which one of the long ones is wrong: (2 + 8 + 8) / 3 = 6.
            (6, 1 / 3, 6.0),
            # A cap of 9.5 tokens is one of 9: (2 + 9 + 9) / 3.
            (7, 1 / 3, 20 / 3),
            (22 / 3, 2 / 3, 22 / 3),
            (100, 2 / 3, 22 / 3),
            (2, 1 / 3, 2.0),
            (1, 0.0, 1.0),
            (0, 0.0, 0.0),
        ],
    )
    def test_by_hand(self, tokens: float, accuracy: float, spent: float) -> None:
        groups = [[episode(10), episode(2)], [episode(10, WRONG)]]
        assert cut_short(groups, tokens) == Control(pytest.approx(accuracy), pytest.approx(spent))

    def test_what_is_cut_has_no_answer_and_what_ends_at_the_cap_has_one(self) -> None:
        assert cut_short([[episode(4), episode(8), episode(8)]], 4) == Control(1 / 3, 4.0)
        assert cut_short([[episode(5), episode(6), episode(7), episode(8)]], 5) == Control(1 / 4, 5.0)

    lengths = st.lists(st.integers(0, 300), min_size=1, max_size=60)

    @given(lengths, st.floats(0, 400))
    def test_it_spends_no_more_than_it_may_and_one_token_more_would(self, lengths: list[int], tokens: float) -> None:
        control = cut_short([[episode(length) for length in lengths]], tokens)
        assert control.tokens <= tokens + 1e-6
        # The cap is the only number that is consistent with what was spent, unless nothing was cut.
        caps = [cap for cap in range(302) if fmean(min(cap, length) for length in lengths) <= tokens + 1e-6]
        cap = max(caps)
        assert control.tokens == pytest.approx(fmean(min(cap, length) for length in lengths))
        assert control.accuracy == pytest.approx(fmean(length <= cap for length in lengths))

    @given(lengths)
    def test_with_the_tokens_that_it_takes_nothing_is_cut(self, lengths: list[int]) -> None:
        control = cut_short([[episode(length) for length in lengths]], fmean(lengths))
        assert control == Control(1.0, pytest.approx(fmean(lengths)))


class TestMajority:
    def test_by_hand(self) -> None:
        groups = [
            [episode(1, WRONG), episode(2), episode(4), episode(100, "9")],
            [episode(10), episode(20, WRONG), episode(40, WRONG), episode(100)],
        ]
        assert majority(groups, 1) == Control(0.5, 5.5)
        # At a tie the earliest wins: a wrong one in the first group, the right one in the second.
        assert majority(groups, 2) == Control(0.5, (3 + 30) / 2)
        # Two against one.
        assert majority(groups, 3) == Control(0.5, (7 + 70) / 2)
        assert majority([groups[0]], 3) == Control(1.0, 7.0)
        assert majority([groups[1]], 3) == Control(0.0, 70.0)
        assert majority([groups[1]], 4) == Control(1.0, 170.0)

    def test_samples_without_an_answer_cost_tokens_and_do_not_vote(self) -> None:
        silent = [episode(5, None), episode(5, None), episode(3), episode(1, WRONG)]
        assert majority([silent], 2) == Control(0.0, 10.0)
        assert majority([silent], 3) == Control(1.0, 13.0)
        assert majority([silent], 4) == Control(1.0, 14.0)

    def test_more_votes_than_samples_are_all_samples(self) -> None:
        assert majority([[episode(5), episode(7)]], 100) == Control(1.0, 12.0)

    def test_right_answers_are_one_however_they_are_written_and_wrong_ones_without_their_trimmings(self) -> None:
        first, wrong, again = episode(1), episode(1, WRONG), episode(1, "2.0")
        assert majority([[wrong, wrong, first, again, again]], 5).accuracy == 1.0
        assert majority([[first, again, wrong, episode(1, "$3$."), episode(1, " 3")]], 5).accuracy == 0.0


def test_a_choice_by_lot() -> None:
    assert mixed(Control(1.0, 100.0), Control(0.5, 20.0), 0.25) == Control(0.625, 40.0)
    assert mixed(Control(1.0, 100.0), Control(0.5, 20.0), 1.0) == Control(1.0, 100.0)


class TestForSameTokens:
    long: ClassVar = [episode(20), episode(100, problem="q")]
    short: ClassVar = [
        *(episode(10, answer, sample=sample) for sample, answer in enumerate((WRONG, RIGHT, RIGHT, "9"))),
        *(
            episode(10, answer, sample=sample, problem="q")
            for sample, answer in enumerate((WRONG, WRONG, RIGHT, WRONG))
        ),
    ]

    def held_against(self, *tokens: int) -> dict[str, Control]:
        failed = Episode(Transcript(Problem("r", "1 + 1?", "2")), 0, 0, error="KeyError: 'x'")
        trained = [failed, *(episode(count, problem=f"p{count}") for count in tokens)]
        runs = {"trained": trained, "slow": self.long, "quick": self.short}
        return for_same_tokens(runs, "trained", thorough="slow", brief="quick")

    def test_by_hand(self) -> None:
        # 40 tokens: a cap of 60; the slow one, of 60, in (40 − 10) / (60 − 10) of the cases; 4 votes of 10.
        assert self.held_against(20, 60) == {
            "slow, cut short": Control(0.5, 40.0),
            "slow or quick, by lot": Control(pytest.approx(0.6), pytest.approx(40.0)),
            "quick, majority of 4": Control(0.5, 40.0),
        }

    def test_a_run_that_is_briefer_than_the_brief_one_or_more_thorough_than_the_thorough_one(self) -> None:
        assert self.held_against(4) == {
            "slow, cut short": Control(0.0, 4.0),
            "slow or quick, by lot": Control(0.0, 10.0),
            "quick, majority of 1": Control(0.0, 10.0),
        }
        assert self.held_against(200) == {
            "slow, cut short": Control(1.0, 60.0),
            "slow or quick, by lot": Control(1.0, 60.0),
            "quick, majority of 4": Control(0.5, 40.0),  # all that it has
        }


class TestVoting:
    def test_by_hand(self) -> None:
        # Of the three pairs, only that of the two right ones elects the right answer: a tie goes to the earlier.
        group = [episode(1, WRONG), episode(2), episode(3)]
        assert voting([group], 1) == Control(pytest.approx(2 / 3), 2.0)
        assert voting([group], 2) == Control(pytest.approx(1 / 3), 4.0)
        assert voting([group], 3) == Control(1.0, 6.0)
        assert voting([group], 9) == Control(1.0, 6.0)
        # Each problem counts the same, however many samples it has.
        assert voting([group, [episode(10, WRONG)]], 1) == Control(pytest.approx(1 / 3), 6.0)

    def test_many_subsets_are_drawn_and_the_same_seed_draws_the_same(self) -> None:
        group = [episode(n, RIGHT if n % 3 else WRONG, sample=n) for n in range(20)]
        drawn = voting([group], 3)
        assert drawn == voting([group], 3) != voting([group], 3, seed=1)
        # 13 of 20 are right: 3 or 2 of the three, in (286 + 78 · 7) / 1140 of the cases, and four standard errors.
        assert drawn.accuracy == pytest.approx(832 / 1140, abs=4 * (0.2 / SUBSETS) ** 0.5)
        assert drawn.tokens == pytest.approx(3 * 9.5, abs=3)


class TestAtAllBudgets:
    alone: ClassVar = [
        *(episode(10, answer, sample=n) for n, answer in enumerate((RIGHT, RIGHT, RIGHT, WRONG))),
        *(episode(30, answer, sample=n, problem="q") for n, answer in enumerate((WRONG, RIGHT, RIGHT, RIGHT))),
        *(episode(99, sample=n, problem="only alone") for n in range(4)),
    ]

    def test_by_hand(self) -> None:
        team = [episode(20), episode(40, problem="q"), episode(1, problem="only the team's")]
        found = at_all_budgets(team, self.alone)
        assert (found.problems, found.team) == (2, Control(1.0, 30.0))
        assert found.interval == (pytest.approx(0.342, abs=1e-3), 1.0)
        assert found.cut_short[0] == Control(0.0, 0.0)
        assert found.cut_short[-1] == Control(0.75, 20.0)
        assert found.cut_short[30] == Control(3 / 8, 10.0)
        # q's pairs: three of the six have the wrong one first, which wins; p's: the right one is always first.
        assert found.voting == {1: Control(0.75, 20.0), 2: Control(0.75, 40.0), 4: Control(1.0, 80.0)}
        assert found.same_tokens == {"cut short": Control(0.75, 20.0), "voting": Control(0.75, 30.0)}

    def test_the_teams_gain_is_paired_by_problem(self) -> None:
        # On half of 40 problems all are right, on the others none but the team on every fifth.
        problems = [(f"p{n:02}", n % 2 == 0, n % 10 == 1) for n in range(40)]
        team = [episode(10, RIGHT if easy or won else WRONG, problem=id) for id, easy, won in problems for _ in "ab"]
        alone = [episode(10, RIGHT if easy else WRONG, problem=id) for id, easy, _ in problems for _ in "abcd"]
        found = at_all_budgets(team, alone)
        apart = np.array([float(won) for _, _, won in problems])
        half = 2.0227 * apart.std(ddof=1) / 40**0.5  # Student's
        for gain in found.gains.values():
            assert gain.value == pytest.approx(0.1)
            assert (gain.high - gain.low) / 2 == pytest.approx(half, rel=0.15)
        # Unpaired, and over samples: as uncertain as half of 40 coins.
        assert found.interval == over_problems(team)
        assert found.interval[1] - found.interval[0] > 0.28

    def test_the_gain_is_that_over_the_control_for_the_same_tokens(self) -> None:
        for tokens in (5, 15, 30, 60, 500):
            found = at_all_budgets([episode(tokens), episode(tokens, WRONG, problem="q")], self.alone)
            for name, control in found.same_tokens.items():
                assert found.gains[name].value == pytest.approx(found.team.accuracy - control.accuracy)

    @pytest.mark.parametrize(("tokens", "accuracy", "spent"), [(5, 0.75, 20.0), (60, 0.875, 60.0), (500, 1.0, 80.0)])
    def test_voting_for_the_tokens_of_the_team(self, tokens: int, accuracy: float, spent: float) -> None:
        found = at_all_budgets([episode(tokens), episode(tokens, problem="q")], self.alone)
        assert found.same_tokens["voting"] == Control(pytest.approx(accuracy), pytest.approx(spent))

    def test_other_problems(self) -> None:
        with pytest.raises(InputError, match="none of the 3 problems"):
            at_all_budgets([episode(1, problem="x")], self.alone)
