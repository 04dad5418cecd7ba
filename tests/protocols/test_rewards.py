import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest

from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.protocols.rewards import (
    SHORT,
    THINK,
    Correctness,
    Format,
    Reward,
    RewardSum,
    Schedule,
    Term,
    ThinklessTable,
    Weighted,
    mode_of,
)

TAGS = {"long": (("<think>",), ("</think>",)), "short": (("<answer>",), ("</answer>", "</rethink>"))}


def step(text: str, *, seat: str = "long", prefill: str = "", stop: str | None = None) -> Step:
    return Step(seat, "state", Reply(text, len(text.split()), "stop" if stop else "end", stop), prefill)


def episode(
    *steps: Step, outcome: Outcome | None = Outcome.RIGHT, problem: str = "p", error: str | None = None
) -> Episode:
    transcript = Transcript(Problem(problem, "1 + 1?", "2"), steps)
    return Episode(transcript, 0, 0, Grade(outcome) if outcome else None, error)


RIGHT, WRONG = episode(), episode(outcome=Outcome.WRONG)


@dataclass(frozen=True, slots=True)
class Given(Term):
    name: ClassVar[str] = "given"

    values: tuple[float, ...]

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        return list(self.values)


class TestReward:
    def test_the_total_is_the_sum_of_the_terms(self) -> None:
        assert Reward({"a": 0.1, "b": 0.2, "c": -0.3}).total == pytest.approx(0)
        assert Reward({"a": 1e16, "b": 1.0, "c": -1e16}).total == 1.0


class TestSum:
    def test_terms_come_weighted_by_name_for_each_seat_and_episode(self) -> None:
        total = RewardSum((Weighted(Correctness(), 2.0), Format(TAGS)))
        good = episode(step("<think>a</think>"), step("<answer>b</answer", seat="short"))
        bad = episode(step("<think>a"), outcome=Outcome.UNPARSABLE)
        assert total([good, bad], ("long", "short")) == [
            {"long": Reward({"correctness": 2.0, "format": 1.0}), "short": Reward({"correctness": 2.0, "format": 0.0})},
            {"long": Reward({"correctness": 0.0, "format": 0.0}), "short": Reward({"correctness": 0.0, "format": 1.0})},
        ]

    def test_a_weight_can_follow_the_training_step(self) -> None:
        total = RewardSum((Weighted(Given((3.0,)), Schedule(((0, 0.0), (100, 0.5)))),))
        assert [total([RIGHT], ("a",), step)[0]["a"].total for step in (0, 99, 100)] == [0.0, 0.0, 1.5]

    @pytest.mark.parametrize(
        ("group", "message"),
        [
            ([], "this one is empty"),
            ([episode(problem="p"), episode(problem="q")], r"one problem; this one has \['p', 'q'\]"),
            ([RIGHT, episode(outcome=None, error="boom")], r"'p#0' has no grade, since it ended in an error \(boom\)"),
            ([RIGHT, episode(outcome=None)], "it was never graded"),
        ],
    )
    def test_what_is_no_group_is_refused(self, group: list[Episode], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RewardSum((Correctness(),))(group, ("a",))

    def test_a_reward_is_finite(self) -> None:
        for value in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match="a reward must be finite; seat 'a' in episode 'p#0'"):
                RewardSum((Given((value,)),))([RIGHT], ("a",))

    def test_a_term_pays_every_episode(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            RewardSum((Given((1.0,)),))([RIGHT, WRONG], ("a",))

    @pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
    def test_weights_are_finite(self, weight: float) -> None:
        with pytest.raises(ValueError, match="'correctness' must be a finite number"):
            Weighted(Correctness(), weight)

    def test_names_are_unique(self) -> None:
        twice = (Correctness(), Weighted(Correctness(), 2.0))
        with pytest.raises(ValueError, match="a name of its own"):
            RewardSum(twice)
        with pytest.raises(ValueError, match="'right beats wrong' is taken"):
            RewardSum((Weighted(Correctness(), name="right beats wrong"),))
        with pytest.raises(ValueError, match="at least one term"):
            RewardSum(())
        named = RewardSum((Correctness(), Weighted(Correctness(), 2.0, name="again")))
        assert named([RIGHT], ("a",))[0]["a"].terms == {"correctness": 1.0, "again": 2.0}

    def test_it_pickles(self) -> None:
        total = RewardSum((Weighted(Format(TAGS), Schedule(((0, 0.0), (5, 1.0)), "linear")), ThinklessTable(0.2)))
        assert pickle.loads(pickle.dumps(total)) == total


class TestRightBeatsWrong:
    GROUP: ClassVar = [RIGHT, WRONG, RIGHT, WRONG]

    def totals(self, values: tuple[float, ...], margin: float = 0.1) -> list[float]:
        rewards = RewardSum((Given(values),), right_beats_wrong=True, margin=margin)(self.GROUP, ("a",))
        return [reward["a"].total for reward in rewards]

    def test_wrong_answers_are_lowered_together_as_little_as_it_takes(self) -> None:
        assert self.totals((0.5, 0.75, 1.0, 0.25), margin=0.5) == [0.5, 0.0, 1.0, -0.5]

    def test_nothing_is_lowered_where_right_already_beats_wrong(self) -> None:
        assert self.totals((0.5, 0.25, 1.0, -1.0)) == [0.5, 0.25, 1.0, -1.0]

    def test_the_lowering_is_a_term_of_its_own(self) -> None:
        total = RewardSum((Given((0.0, 1.0)),), right_beats_wrong=True, margin=0.5)
        right, wrong = total([RIGHT, WRONG], ("a",))
        assert right["a"].terms == {"given": 0.0, "right beats wrong": 0.0}
        assert wrong["a"].terms == {"given": 1.0, "right beats wrong": -1.5}

    @pytest.mark.parametrize("group", [[RIGHT, RIGHT], [WRONG, WRONG]])
    def test_a_group_all_right_or_all_wrong_stays_as_it_is(self, group: list[Episode]) -> None:
        rewards = RewardSum((Given((3.0, -3.0)),), right_beats_wrong=True)(group, ("a",))
        assert [reward["a"].total for reward in rewards] == [3.0, -3.0]

    @pytest.mark.parametrize("margin", [0.0, -1.0, float("nan"), float("inf")])
    def test_the_margin_is_above_0(self, margin: float) -> None:
        with pytest.raises(ValueError, match="margin"):
            RewardSum((Correctness(),), right_beats_wrong=True, margin=margin)


class TestSchedule:
    def test_steps_hold_until_the_next(self) -> None:
        schedule = Schedule(((10, 0.0), (20, 0.5), (30, 1.0)))
        assert [schedule.at(step) for step in (0, 10, 19, 20, 29, 30, 99)] == [0, 0, 0, 0.5, 0.5, 1, 1]

    def test_linear_joins_the_points(self) -> None:
        schedule = Schedule(((10, 0.0), (20, 0.5), (30, -0.5)), "linear")
        assert [schedule.at(step) for step in (0, 10, 15, 20, 25, 30, 99)] == [0, 0, 0.25, 0.5, 0, -0.5, -0.5]

    @pytest.mark.parametrize("points", [(), ((5, 0.0), (5, 1.0)), ((5, 0.0), (4, 1.0))])
    def test_steps_increase(self, points: tuple[tuple[int, float], ...]) -> None:
        with pytest.raises(ValueError, match="its steps must increase"):
            Schedule(points)

    def test_values_are_finite_and_the_way_between_is_known(self) -> None:
        with pytest.raises(ValueError, match="finite"):
            Schedule(((0, float("nan")),))
        with pytest.raises(ValueError, match="'steps' or 'linear'"):
            Schedule(((0, 1.0),), "cosine")  # type: ignore[arg-type]


class TestCorrectness:
    def test_only_right_is_paid(self) -> None:
        group = [episode(outcome=outcome) for outcome in Outcome]
        assert Correctness().pay(group, "any") == [1.0, 0.0, 0.0, 0.0]


class TestFormat:
    @pytest.mark.parametrize(
        ("turn", "well_formed"),
        [
            (step("<think>a < b, so <b>it</b> holds</think>"), True),
            (step("\n <think>a</think>\n"), True),
            (step("a</think>", prefill="<think>"), True),
            (step("<answer>4</answer>", seat="short"), True),
            (step("<answer>4</rethink>", seat="short"), True),
            (step("<think></think>"), False),
            (step("<think> \n </think>"), False),
            (step("</think>", prefill="<think>"), False),
            (step("<think>"), False),
            (step("<think>cut off"), False),
            (step("a</think>"), False),
            (step("<think>a</think> and more"), False),
            (step("<think>a<think>b</think>"), False),
            (step("<think>the <answer> tag</think>"), False),
            (step("<answer>a</think>"), False),
            (step("<answer>a</rethink>b</answer>", seat="short"), False),
            (step("4</answer>", seat="short", prefill="<answer>Final answer:"), True),
            (step("</answer>", seat="short", prefill="<answer>Final answer:"), False),
        ],
    )
    def test_a_turn_is_well_formed_or_not(self, turn: Step, well_formed: bool) -> None:
        assert Format(TAGS).well_formed(turn) is well_formed

    def test_a_seat_is_paid_the_share_of_its_own_turns(self) -> None:
        played = episode(
            step("<think>a</think>"), step("<answer>b", seat="short"), step("<think>c"), step("<think>d</think>")
        )
        assert Format(TAGS).pay([played], "long") == [pytest.approx(2 / 3)]
        assert Format(TAGS).pay([played], "short") == [0.0]

    def test_a_seat_that_never_spoke_broke_no_rule(self) -> None:
        assert Format(TAGS).pay([episode(step("<think>a</think>"))], "short") == [1.0]

    def test_a_seat_may_need_no_tags(self) -> None:
        free = Format({**TAGS, "gate": ((), ())})
        assert free.pay([episode(step("go", seat="gate")), episode(step(" ", seat="gate"))], "gate") == [1.0, 0.0]
        with pytest.raises(ValueError, match="no tags for seat 'gate'"):
            Format(TAGS).pay([RIGHT], "gate")

    @pytest.mark.parametrize("sides", [("<a>", "</a>"), (("<a>",), ("",)), (("<a>",),)])
    def test_tags_are_two_tuples_of_strings(self, sides: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
        with pytest.raises(ValueError, match="two tuples of non-empty strings"):
            Format({"a": sides})


def routed(token: str, outcome: Outcome, response: str = "so 2") -> Episode:
    return episode(step(token, stop=token), step(response), outcome=outcome)


class TestThinkless:
    def test_the_papers_table(self) -> None:
        group = [
            routed(SHORT, Outcome.RIGHT),
            routed(THINK, Outcome.RIGHT),
            routed(SHORT, Outcome.WRONG),
            routed(THINK, Outcome.UNPARSABLE),
        ]
        paid = ThinklessTable().pay(group, "solver")
        assert paid == [1, 0.5, -1, -1]
        # The advantages of papers.md A4: centred by the group's mean, not divided by its deviation.
        assert [value - sum(paid) / 4 for value in paid] == [1.125, 0.625, -0.875, -0.875]
        assert ThinklessTable(gamma=0.2).pay(group, "solver") == [1, 0.8, -1, -1]

    def test_a_right_answer_without_a_mode_is_paid_as_wrong(self) -> None:
        assert ThinklessTable().pay([episode(step("so 2")), episode()], "solver") == [-1, -1]

    @pytest.mark.parametrize("gamma", [0.0, 1.0, -0.5, 2.0, float("nan")])
    def test_gamma_lies_between_0_and_1(self, gamma: float) -> None:
        with pytest.raises(ValueError, match="gamma must lie between 0 and 1"):
            ThinklessTable(gamma)

    @pytest.mark.parametrize(
        ("steps", "mode"),
        [
            ((), None),
            ((step(SHORT, stop=SHORT), step("2")), SHORT),
            ((step(THINK, stop=THINK), step("I might have said <short>.</think> 2")), THINK),
            ((step("so 2", prefill=SHORT),), SHORT),
            ((step("so 2", prefill=THINK, stop=SHORT),), THINK),
            ((step("maybe"), step(SHORT, stop=SHORT)), None),
            ((step("<short> is what I would say"),), None),
        ],
    )
    def test_the_mode_is_read_from_the_first_step_alone(self, steps: tuple[Step, ...], mode: str | None) -> None:
        assert mode_of(Transcript(Problem("p", "", ""), steps)) == mode
