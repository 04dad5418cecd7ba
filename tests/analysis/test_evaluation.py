from statistics import fmean

import pytest

from turnwise.analysis.evaluation import breaks_form, difference, evaluate
from turnwise.analysis.statistics import Estimate
from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Finish, Reply, Step, Transcript
from turnwise.protocols.graph import END, GraphProtocol, State, TurnGraph
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.rewards import Correctness, RewardSum
from turnwise.protocols.solo import Solo
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.summary import accuracy_efficiency_score, wilson


def step(state: str, text: str, *, seat: str = "solver", tokens: int = 5, stop: str = "", cut: bool = False) -> Step:
    finish: Finish = "length" if cut else "stop" if stop else "end"
    return Step(seat, state, Reply(text + stop, tokens, finish, stop or None))


def episode(
    problem: int,
    right: bool = True,
    *,
    sample: int = 0,
    seed: int = 0,
    tokens: int = 10,
    outcome: Outcome | None = None,
) -> Episode:
    grade = Grade(outcome or (Outcome.RIGHT if right else Outcome.WRONG))
    steps = (step("solve", "2", tokens=tokens),)
    return Episode(Transcript(Problem(f"p{problem}", "1 + 1?", "2"), steps), sample, seed, grade)


def failed(problem: int, sample: int = 0) -> Episode:
    return Episode(Transcript(Problem(f"p{problem}", "1 + 1?", "2")), sample, 0, error="KeyError: 'x'")


class TestEvaluate:
    def test_by_hand(self) -> None:
        # Two problems, two seeds of two samples: 3 of 4 right in 10 tokens, and 1 of 4 right in 30.
        runs = [
            episode(problem, right, sample=sample, seed=seed, tokens=tokens)
            for problem, tokens, rights in ((0, 10, (1, 1, 1, 0)), (1, 30, (0, 0, 1, 0)))
            for (seed, sample), right in zip(((0, 0), (0, 1), (1, 0), (1, 1)), map(bool, rights), strict=True)
        ]
        found = evaluate(runs)
        assert (found.episodes, found.failed, found.problems, found.samples, found.seeds) == (8, 0, 2, 4, (0, 1))
        assert found.accuracy.value == 0.5
        assert found.by_seed == {0: 0.5, 1: 0.5}
        # pass@2: 1 - C(1, 2) / C(4, 2) = 1 and 1 - C(3, 2) / C(4, 2) = 1/2
        assert {k: share.value for k, share in found.pass_at.items()} == {2: 0.75, 4: 1.0}
        assert found.tokens == Estimate(20.0, 10.0, 30.0)
        # 4 · 10 + 4 · 30 tokens for 4 right answers
        assert found.tokens_per_right is not None
        assert found.tokens_per_right.value == 40.0
        assert found.outcomes == {Outcome.RIGHT: 4, Outcome.WRONG: 4}
        assert (found.turns, found.seat_tokens, found.think_share, found.cut_off) == (1.0, {"solver": 20.0}, None, 0.0)
        assert found.ill_formed is None

    def test_each_problem_counts_the_same_however_many_of_its_samples_failed(self) -> None:
        runs = [*(episode(0, sample=sample) for sample in range(3)), episode(1, False), failed(1, 1), failed(1, 2)]
        found = evaluate(runs)
        assert found.accuracy.value == 0.5
        assert (found.episodes, found.failed, found.samples, found.pass_at) == (4, 2, 1, {})

    def test_outcomes_are_told_apart(self) -> None:
        found = evaluate([episode(number, outcome=outcome) for number, outcome in enumerate(Outcome)])
        assert found.outcomes == dict.fromkeys(Outcome, 1)

    def test_pass_at_powers_of_two_and_at_all_samples(self) -> None:
        found = evaluate([episode(0, sample < 2, sample=sample) for sample in range(6)])
        # 1 - C(4, k) / C(6, k)
        assert {k: round(share.value, 6) for k, share in found.pass_at.items()} == {2: 0.6, 4: 0.933333, 6: 1.0}

    def test_where_all_or_nothing_is_right_the_interval_is_wilsons(self) -> None:
        assert evaluate([episode(number) for number in range(24)]).accuracy == Estimate(1.0, *wilson(24, 24))
        nothing = evaluate([episode(number, False) for number in range(24)])
        assert nothing.accuracy == Estimate(0.0, *wilson(0, 24))
        assert nothing.tokens_per_right is None

    def test_something_must_have_finished(self) -> None:
        with pytest.raises(ValueError, match="at least one finished episode"):
            evaluate([failed(0)])


class TestForm:
    def test_long_short(self) -> None:
        protocol = LongShort()
        fine = [
            step("think", "<think>a < b", seat="long", stop="</think>"),
            step("answer", "<answer>\\boxed{2}", seat="short", stop="</answer>"),
            step("think", "<think>long", seat="long", cut=True),  # cut off, and nothing else
        ]
        broken = [
            step("think", "<think>and never closed", seat="long"),
            step("think", "not opened", seat="long", stop="</think>"),
            step("answer", "<answer><think>\\boxed{2}", seat="short", stop="</answer>"),
        ]
        assert [breaks_form(protocol, one) for one in fine + broken] == [False] * 3 + [True] * 3
        transcript = Transcript(Problem("p", "1 + 1?", "2"), (*fine, *broken))
        found = evaluate([Episode(transcript, 0, 0, Grade(Outcome.WRONG))], protocol)
        assert (found.cut_off, found.ill_formed) == (1 / 6, 0.5)

    def test_a_choice_of_mode_is_no_turn_that_is_cut_off(self) -> None:
        steps = (step("route", "Well", cut=True), step("think", "<think>so", cut=True), step("short", "2", seat="b"))
        found = evaluate(
            [Episode(Transcript(Problem("p", "1 + 1?", "2"), steps), 0, 0, Grade(Outcome.WRONG))], Thinkless()
        )
        assert (found.cut_off, found.seat_cut_off) == (0.5, {"solver": 1.0, "b": 0.0})

    def test_a_choice_of_mode_that_chose_none(self) -> None:
        protocol = Thinkless()
        assert not breaks_form(protocol, step("route", "", stop="<think>"))
        assert breaks_form(protocol, step("route", "Well", cut=True))
        assert not breaks_form(protocol, step("think", "so </think> 2"))
        assert breaks_form(protocol, step("think", "so 2"))

    def test_a_state_without_tags_asks_for_nothing(self) -> None:
        states = {"say": State(seat="a", closes={"<end>": END}), "more": State(seat="a")}
        states["say"] = states["say"].model_copy(update={"then": "more"})
        protocol = GraphProtocol(TurnGraph(seats={"a": ""}, start="say", states=states), RewardSum((Correctness(),)))
        assert breaks_form(protocol, step("say", "well", seat="a"))
        assert not breaks_form(protocol, step("more", "well", seat="a"))
        assert not breaks_form(Solo(), step("solve", ""))


class TestDifference:
    def test_by_hand(self) -> None:
        ours = [episode(number, number < 6, tokens=40) for number in range(10)]
        base = [episode(number, number < 5, tokens=100) for number in range(10)]
        found = difference(ours, base, baseline="alone")
        assert (found.baseline, found.problems) == ("alone", 10)
        assert (found.accuracy.value, found.tokens) == (pytest.approx(0.1), Estimate(-60.0, -60.0, -60.0))
        assert found.aes is not None
        assert found.aes.value == pytest.approx(0.6 + 3 * 0.2)
        assert pytest.approx(found.aes.low) == 0.6
        # One problem in ten on which they differ, in a sample of ten: perhaps none of them, perhaps four.
        assert (found.accuracy.low, found.accuracy.high) == (0.0, pytest.approx(0.4))

    @pytest.mark.parametrize(("right", "base_right"), [(3, 5), (5, 5), (8, 5), (0, 1)])
    def test_aes_is_that_of_the_summary(self, right: int, base_right: int) -> None:
        ours = [episode(number, number < right, tokens=number + 1) for number in range(10)]
        base = [episode(number, number < base_right, tokens=20 - number) for number in range(10)]
        found = difference(ours, base, baseline="alone").aes
        assert found is not None
        assert found.value == pytest.approx(
            accuracy_efficiency_score(right / 10, 5.5, base_accuracy=base_right / 10, base_tokens=fmean(range(11, 21)))
        )

    def test_it_is_over_the_problems_that_both_have_met(self) -> None:
        ours = [episode(0), episode(1, False), episode(2), failed(3)]
        base = [episode(3), episode(2, False), episode(1, False), episode(1, True, sample=1)]
        found = difference(ours, base, baseline="alone")
        # p1: 0 against 1/2; p2: 1 against 0
        assert (found.problems, found.accuracy.value) == (2, 0.25)
        with pytest.raises(ValueError, match="no problem in common"):
            difference(ours, [episode(7)], baseline="alone")

    def test_equally_right_on_each_problem_is_no_proof_that_they_are_equal(self) -> None:
        same = [episode(number, number % 2 == 0) for number in range(24)]
        apart = wilson(0, 24)[1]
        assert difference(same, same, baseline="same").accuracy == Estimate(0.0, -apart, apart)

    def test_there_is_no_aes_against_a_baseline_that_was_never_right(self) -> None:
        assert difference([episode(0)], [episode(0, False)], baseline="wrong").aes is None
