"""Seats whose worth is known exactly, and turns that nobody is asked twice."""

import asyncio
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.agents.agent import Agent
from turnwise.agents.scripted import ScriptedAgent
from turnwise.agents.tiny import LONG, SHORT
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.analysis.contribution import Contribution, Marginal, ablated, branch, contribution
from turnwise.analysis.statistics import change
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.environment import Environment, Grade, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Turn
from turnwise.protocols.debate import Debate
from turnwise.protocols.graph import GraphProtocol, State, TurnGraph
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.protocols.rewards import Correctness, RewardSum
from turnwise.protocols.solo import Solo
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.episode_store import EpisodeStore
from turnwise.rl.rollout import Team, in_order, play
from turnwise.rl.summary import wilson


class Exact(Grader):
    async def grade(self, problem: Problem, text: str) -> Grade:
        return Grade(Outcome.RIGHT if f"[{problem.answer}]" in text else Outcome.WRONG, text)


class Refusing(Grader):
    async def grade(self, problem: Problem, text: str) -> Grade:
        raise AssertionError(f"asked to grade {text!r} again")


class Counting(Agent):
    """Says what a script says, and counts how often it is asked."""

    def __init__(self, script: Callable[[Turn, int], str | Reply]) -> None:
        self.asked = 0
        self._agent = ScriptedAgent(script)

    async def reply(self, turn: Turn, seed: int) -> Reply:
        self.asked += 1
        return await self._agent.reply(turn, seed)


# The answers are 0 and 1 in turn, and the question is the answer's sum.
ENVIRONMENT = Environment("ten", [Problem(f"p{n}", f"{n % 2} + 0?", str(n % 2)) for n in range(10)], Exact())


def think(turn: Turn, seed: int) -> str:
    question = next(message.text for message in turn.messages if message.role == "user")
    return f"<think> It is {question[0]}. </think>"


def conclude(turn: Turn, seed: int) -> str:
    """What the thought says, or else 0: right for half of the problems."""
    found = re.findall(r"It is (\d)", "".join(message.text for message in turn.messages))
    return f"<answer> [{found[-1] if found else 0}] </answer>"


def branched(
    protocol: ReasoningProtocol,
    team: Team,
    episodes: Sequence[Episode],
    seat: str,
    agent: Agent,
    *,
    grader: Grader | None = None,
    concurrency: int = 64,
    store: EpisodeStore | None = None,
) -> list[Episode]:
    async def gather() -> list[Episode]:
        stream = branch(protocol, team, grader or Exact(), episodes, seat, agent, concurrency=concurrency, store=store)
        return [episode async for episode in stream]

    problems = list({episode.transcript.problem.id: episode.transcript.problem for episode in episodes}.values())
    return in_order(Environment("all", problems, Exact()), asyncio.run(gather()))


@pytest.fixture
def team() -> dict[str, Counting]:
    return {"long": Counting(think), "short": Counting(conclude)}


@pytest.fixture
def episodes(team: dict[str, Counting]) -> list[Episode]:
    played = play(LongShort(), team, ENVIRONMENT, samples=2, seed=3)
    for agent in team.values():
        assert agent.asked == 20
        agent.asked = 0
    return played


class TestKnownExactly:
    def test_without_its_thoughts_half_is_right(self, team: dict[str, Counting], episodes: list[Episode]) -> None:
        again = branched(LongShort(), team, episodes, "long", ablated())
        found = contribution(LongShort(), "long", "ablated", episodes, again)
        worth = change(np.ones(10), np.array([1.0, 0.0] * 5))
        low, high = worth.low, worth.high
        assert found == Contribution(
            seat="long", instead="ablated", problems=10, episodes=20, failed=0,
            # A thought has 5 words and an answer 3.
            accuracy=Marginal(1.0, 0.5, 0.5, low, high),
            tokens=Marginal(8.0, 3.0, 5.0, 5.0, 5.0), seat_tokens=5.0, reached=1.0, empty=0.0, new_tokens=60,
        )  # fmt: skip
        assert found.accuracy.low > 0
        assert found.alarms == []
        assert (team["long"].asked, team["short"].asked) == (0, 20)
        assert [step.text for step in again[1].transcript.steps] == ["", "<answer> [0] </answer>"]

    def test_without_its_answers_nothing_is(self, team: dict[str, Counting], episodes: list[Episode]) -> None:
        found = contribution(
            LongShort(), "short", "ablated", episodes, branched(LongShort(), team, episodes, "short", ablated())
        )
        # Everywhere the same: other problems may yet be otherwise.
        assert found.accuracy == Marginal(1.0, 0.0, 1.0, 1 - 2 * wilson(0, 10)[1], 1.0)
        assert found.alarms == []
        assert found.tokens == Marginal(8.0, 5.0, 3.0, 3.0, 3.0)
        # What stands before its first turn is not played again, and nobody speaks after it.
        assert found.new_tokens == 0
        assert (team["long"].asked, team["short"].asked) == (0, 0)

    def test_a_better_one_in_its_place(self, team: dict[str, Counting], episodes: list[Episode]) -> None:
        worse = Counting(lambda turn, seed: "<think> Let me see: It is 1. </think>")
        again = branched(LongShort(), team, episodes, "long", worse)
        found = contribution(LongShort(), "long", "worse", episodes, again)
        assert (found.accuracy.team, found.accuracy.without) == (1.0, 0.5)
        assert (found.tokens.team, found.tokens.without, found.new_tokens) == (8.0, 11.0, 220)
        assert worse.asked == 20

    def test_a_seat_that_does_harm(self, team: dict[str, Counting]) -> None:
        team["long"] = Counting(lambda turn, seed: "<think> It is 7. </think>")
        episodes = play(LongShort(), team, ENVIRONMENT)
        found = contribution(
            LongShort(), "long", "ablated", episodes, branched(LongShort(), team, episodes, "long", ablated())
        )
        assert (found.accuracy.team, found.accuracy.without) == (0.0, 0.5)
        (alarm,) = found.alarms
        assert alarm.startswith("the team is better without long: with ablated as long accuracy rises (+1")

    def test_a_seat_that_nobody_heeds_is_lazy(self) -> None:
        team = {"long": Counting(lambda turn, seed: "<think> \n</think>"), "short": Counting(conclude)}
        episodes = play(LongShort(), team, ENVIRONMENT)
        again = branched(LongShort(), team, episodes, "long", ablated("<think></think>"))
        found = contribution(LongShort(), "long", "ablated", episodes, again)
        apart = wilson(0, 10)[1]
        assert found.accuracy == Marginal(0.5, 0.5, 0.0, -apart, apart)
        assert found.tokens == Marginal(5.0, 3.0, 2.0, 2.0, 2.0)
        assert found.empty == 1.0
        assert found.alarms == [
            "long says nothing but tags in 100% of its turns",
            "with ablated as long accuracy changes by nothing that 10 problems can show (-27.8% to +27.8%)",
        ]

    def test_a_seat_that_is_never_asked(self) -> None:
        states = {
            "first": State(seat="first", closes={"</done>": "end", "</help>": "second"}),
            "second": State(seat="second"),
        }
        graph = TurnGraph(seats={"first": "", "second": ""}, start="first", states=states)
        protocol = GraphProtocol(graph, RewardSum((Correctness(),)))
        team = {"first": Counting(lambda turn, seed: "[0] </done>"), "second": Counting(think)}
        episodes = play(protocol, team, ENVIRONMENT)
        team["first"].asked = 0
        again = branched(protocol, team, episodes, "second", ablated(), grader=Refusing())
        assert again == episodes
        found = contribution(protocol, "second", "ablated", episodes, again)
        assert (found.reached, found.empty, found.new_tokens, found.seat_tokens) == (0.0, None, 0, 0.0)
        assert found.alarms[0] == "second never spoke"
        assert (team["first"].asked, team["second"].asked) == (0, 0)

    def test_a_control_token_is_no_empty_turn(self) -> None:
        team = {"solver": ScriptedAgent(["<short>", "[0]"])}
        episodes = play(Thinkless(), team, ENVIRONMENT)
        found = contribution(Thinkless(), "solver", "ablated", episodes, episodes)
        assert found.empty == 0.0


class TestBranchingPoint:
    def test_simultaneous_turns_beside_the_silent_one_are_not_taken_again(self) -> None:
        protocol = Debate()
        team = {seat: Counting(say) for seat in protocol.seats}
        episodes = play(protocol, team, ENVIRONMENT)
        assert [agent.asked for agent in team.values()] == [20, 20, 10]
        branched(protocol, team, episodes, "first", ablated())
        # "second" has read of "first" in the second of two rounds, and the judge has.
        assert [agent.asked for agent in team.values()] == [20, 30, 20]

    def test_who_does_not_read_the_seat_is_not_asked_again(self) -> None:
        states = {
            "draft": State(seat="drafter", then="check"),
            "check": State(seat="checker", reads=(), then="merge"),
            "merge": State(seat="merger"),
        }
        graph = TurnGraph(seats=dict.fromkeys(("drafter", "checker", "merger"), ""), start="draft", states=states)
        protocol = GraphProtocol(graph, RewardSum((Correctness(),)))
        team = {seat: Counting(say) for seat in protocol.seats}
        episodes = play(protocol, team, ENVIRONMENT)
        branched(protocol, team, episodes, "drafter", ablated())
        assert [agent.asked for agent in team.values()] == [10, 10, 20]

    @pytest.mark.parametrize("protocol", [LongShort(), Thinkless(), Debate()], ids=lambda p: type(p).__name__)
    @given(seed=st.integers(0, 100), chosen=st.integers(0, 9))
    @settings(max_examples=10, deadline=None)
    def test_the_seats_own_agent_in_its_place_changes_nothing(
        self, protocol: GraphProtocol, seed: int, chosen: int
    ) -> None:
        seat = protocol.seats[chosen % len(protocol.seats)]
        episodes = play(protocol, dict.fromkeys(protocol.seats, ScriptedAgent(say)), ENVIRONMENT, seed=seed)
        others = dict.fromkeys(protocol.seats, Counting(say))
        again = branched(protocol, others, episodes, seat, ScriptedAgent(say), grader=Refusing())
        assert again == episodes
        assert next(iter(others.values())).asked == 0

    def test_every_turn_before_the_seats_first_is_the_stored_one(self) -> None:
        protocol = LongShort()
        team = dict.fromkeys(protocol.seats, ScriptedAgent(say))
        episodes = play(protocol, team, ENVIRONMENT, samples=3)
        again = branched(protocol, team, episodes, "short", ScriptedAgent(lambda turn, seed: say(turn, seed + 1)))
        for one, other in zip(episodes, again, strict=True):
            assert one.id == other.id
            assert one.transcript.steps[0] == other.transcript.steps[0]
            assert one.transcript.steps[1] != other.transcript.steps[1]

    def test_the_same_at_any_concurrency(self) -> None:
        protocol = Debate()
        team = dict.fromkeys(protocol.seats, ScriptedAgent(say))
        episodes = play(protocol, team, ENVIRONMENT, samples=2)
        once, again = (
            branched(protocol, team, episodes, "second", ablated(), concurrency=concurrency) for concurrency in (1, 64)
        )
        assert once == again
        assert contribution(protocol, "second", "x", episodes, once) == contribution(
            protocol, "second", "x", list(reversed(episodes)), list(reversed(again))
        )


class TestStored:
    def test_a_stopped_one_goes_on(self, tmp_path: Path, team: dict[str, Counting], episodes: list[Episode]) -> None:
        async def begin(store: EpisodeStore) -> None:
            stream = branch(LongShort(), team, Exact(), episodes, "long", ablated(), concurrency=1, store=store)
            async for _ in stream:
                if len(store.ids) >= 7:
                    break
            await stream.aclose()

        with EpisodeStore(tmp_path / "branched", {"seat": "long"}) as store:
            asyncio.run(begin(store))
            kept = len(store.ids)
        assert 7 <= kept < 20
        assert team["short"].asked in (kept, kept + 1)
        before = team["short"].asked
        with EpisodeStore(tmp_path / "branched", {"seat": "long"}) as store:
            assert len(branched(LongShort(), team, episodes, "long", ablated(), store=store)) == 20 - kept
            assert team["short"].asked == before + 20 - kept
            assert branched(LongShort(), team, episodes, "long", ablated(), store=store) == []
            found = contribution(LongShort(), "long", "ablated", episodes, list(store))
        again = branched(LongShort(), team, episodes, "long", ablated())
        assert found == contribution(LongShort(), "long", "ablated", episodes, again)

    def test_samples_that_the_run_lacks_are_not_played(
        self, team: dict[str, Counting], episodes: list[Episode]
    ) -> None:
        failed = Episode(episodes[0].transcript.prefix(1), 0, 3, error="KeyError: 'x'")
        part = [failed, *episodes[3:6]]
        again = branched(LongShort(), team, part, "long", ablated())
        assert [episode.id for episode in again] == [episode.id for episode in part[1:]]
        found = contribution(LongShort(), "long", "ablated", part, again)
        # p1 (one sample) is 1: wrong without its thought; p2 (two samples) is 0.
        assert (found.problems, found.episodes, found.accuracy.without) == (2, 3, 0.5)

    def test_an_episode_that_fails_is_left_out_on_both_sides(
        self, team: dict[str, Counting], episodes: list[Episode]
    ) -> None:
        again = branched(LongShort(), team, episodes, "long", ablated())
        again[0] = Episode(again[0].transcript.prefix(1), 0, 3, error="KeyError: 'x'")
        found = contribution(LongShort(), "long", "ablated", episodes, again)
        assert (found.episodes, found.failed, found.problems) == (19, 1, 10)
        with pytest.raises(InputError, match="none of 20 graded episodes"):
            contribution(LongShort(), "long", "ablated", episodes, again[:1])


def test_who_stands_in_for_another_agent_of_the_run_is_named(
    team: dict[str, Counting], episodes: list[Episode]
) -> None:
    other = {"short": ScriptedAgent(lambda turn, seed: Reply("<answer> [0] </answer>", 3, model="another"))}
    found = contribution(
        LongShort(), "long", "ablated", episodes, branched(LongShort(), other, episodes, "long", ablated())
    )
    assert found.strangers == ("short",)
    assert found.alarms == ["short was not filled by the run's model: the difference is its own, too"]


class TestRefused:
    def test_another_protocol(self, team: dict[str, Counting], episodes: list[Episode]) -> None:
        with pytest.raises(InputError, match=r"p0#0 was not played by this protocol: they part at turn 0"):
            branched(Solo("long"), team, episodes, "long", ablated())
        with pytest.raises(InputError, match="they part at turn 0"):
            branched(Debate(("long", "short")), team, episodes, "long", ablated())

    def test_other_budgets(self, team: dict[str, Counting], episodes: list[Episode]) -> None:
        with pytest.raises(InputError, match=r"p0#0 .* part at turn 1.*budgets"):
            branched(LongShort(short_tokens=2), team, episodes, "long", ablated())

    def test_an_episode_that_did_not_end_there(self, team: dict[str, Counting], episodes: list[Episode]) -> None:
        cut = [Episode(one.transcript.prefix(1), one.sample, one.seed, one.grade) for one in episodes]
        with pytest.raises(InputError, match="p0#0 was not played by this protocol"):
            branched(LongShort(), team, cut, "long", ablated())

    def test_a_seat_or_an_agent_that_is_missing(self, team: dict[str, Counting], episodes: list[Episode]) -> None:
        with pytest.raises(InputError, match=r"no seat 'judge'; its seats are \['long', 'short'\]"):
            branched(LongShort(), team, episodes, "judge", ablated())
        with pytest.raises(InputError, match=r"no agent for seat\(s\) \['short'\]"):
            branched(LongShort(), {}, episodes, "long", ablated())

    def test_several_runs_or_none(self, team: dict[str, Counting], episodes: list[Episode]) -> None:
        other = play(LongShort(), team, ENVIRONMENT, seed=4)
        with pytest.raises(InputError, match="these are of 2 seeds"):
            branched(LongShort(), team, [*episodes, *other], "long", ablated())
        with pytest.raises(InputError, match="these are of 0 seeds"):
            branched(LongShort(), team, [], "long", ablated())


def say(turn: Turn, seed: int) -> Reply:
    """A random text with token ids and log-probabilities, such as an engine returns."""
    rng = random.Random(seed)
    stop = rng.choice([*turn.stops, None])
    ids = tuple(rng.randrange(100) for _ in range(1 if turn.max_tokens == 1 else rng.randint(1, 5)))
    text = " ".join(map(str, ids)) + (stop or "")
    return Reply(
        text, len(ids), "stop" if stop else "end", stop, ids, tuple(-i / 7 for i in ids), (1, 2), "abc", "m", 3
    )


@pytest.fixture(scope="module")
def engines() -> dict[str, TransformersEngine]:
    return {"long": TransformersEngine.load(LONG), "short": TransformersEngine.load(SHORT)}


@pytest.fixture(scope="module")
def environment() -> Iterator[Environment]:
    with MathGrader() as grader:
        yield arithmetic(grader, problem_set="mixed", count=8)


def ids(episodes: Sequence[Episode]) -> list[list[tuple[int, ...]]]:
    return [[step.reply.token_ids for step in episode.transcript.steps] for episode in episodes]


class TestTinyModels:
    def test_who_thinks_is_worth_it(self, engines: dict[str, TransformersEngine], environment: Environment) -> None:
        protocol = LongShort(long_tokens=512, short_tokens=512)
        team = {seat: TransformersAgent(engine, temperature=0.6) for seat, engine in engines.items()}
        episodes = play(protocol, team, environment, seed=1)

        def without() -> list[Episode]:
            return branched(protocol, team, episodes, "long", ablated("<think></think>"), grader=environment.grader)

        again = without()
        assert ids(again) == ids(without())
        found = contribution(protocol, "long", "ablated", episodes, again)
        assert (found.problems, found.failed, found.empty) == (8, 0, 0.0)
        assert found.accuracy.gain > 0.3
        assert found.accuracy.low > 0
        assert found.tokens.gain > 20

        # The same weights in the seat: branched or not, the same tokens, and nobody else need be asked.
        silent = {"short": Counting(conclude)}
        same = branched(protocol, silent, episodes, "long", TransformersAgent(engines["long"], temperature=0.6))
        assert ids(same) == ids(episodes)
        assert silent["short"].asked == 0
