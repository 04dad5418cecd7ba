import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from turnwise.agents.agent import Agent
from turnwise.agents.scripted import ScriptedAgent
from turnwise.environments.environment import Environment, Grade, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Turn
from turnwise.protocols.debate import Debate
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.protocols.solo import Solo
from turnwise.rl.episode_store import EpisodeStore, encode
from turnwise.rl.rollout import Team, play, play_episode, rollout

RUN: dict[str, str | int | float] = {"protocol": "test", "seed": 0}


class LengthGrader(Grader):
    """Right where the text has an even length; an exception for "ungradable"."""

    async def grade(self, problem: Problem, text: str) -> Grade:
        if text == "ungradable":
            raise RuntimeError("the grader is broken")
        return Grade(Outcome.WRONG if len(text) % 2 else Outcome.RIGHT, text)


class SleepyAgent(Agent):
    """Says what its seed has it say, after a sleep that is never the same."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        await asyncio.sleep(random.uniform(0, 0.002))
        rng = random.Random(seed)
        ids = tuple(rng.randrange(1000) for _ in range(rng.randrange(1, 8)))
        return Reply(f"{turn.seat} says {seed}", len(ids), "end", None, ids, tuple(-rng.random() for _ in ids))


class FunctionAgent(Agent):
    """Says what an asynchronous function of the turn says."""

    def __init__(self, say: Callable[[Turn, int], Awaitable[str]]) -> None:
        self.say = say

    async def reply(self, turn: Turn, seed: int) -> Reply:
        return Reply(await self.say(turn, seed), 1)


def environment(count: int) -> Environment:
    return Environment("test", [Problem(f"p{n}", f"question {n}", "42") for n in range(count)], LengthGrader())


def question(turn: Turn) -> str:
    return turn.messages[0].text


def failing_on(
    *numbers: int, error: type[Exception] = RuntimeError, calls: Counter[str] | None = None
) -> ScriptedAgent:
    """Fails on the questions of these numbers, and counts the calls for each question."""

    def say(turn: Turn, seed: int) -> str:
        if calls is not None:
            calls[question(turn)] += 1
        if question(turn) in {f"question {number}" for number in numbers}:
            raise error(f"no answer to {question(turn)}")
        return "even"

    return ScriptedAgent(say)


async def collect(
    protocol: ReasoningProtocol,
    team: Team,
    environment: Environment,
    *,
    samples: int = 1,
    seed: int = 0,
    concurrency: int = 64,
) -> list[Episode]:
    async with asyncio.timeout(600):
        stream = rollout(protocol, team, environment, samples=samples, seed=seed, concurrency=concurrency)
        return [episode async for episode in stream]


def other_tasks() -> set["asyncio.Task[object]"]:
    return asyncio.all_tasks() - {asyncio.current_task()}


# Same seed, same result


@pytest.mark.parametrize("protocol", [Solo(), Debate(("a", "b", "c"), rounds=3)], ids=["solo", "debate"])
def test_episodes_are_byte_identical_at_any_concurrency(protocol: ReasoningProtocol) -> None:
    team: Team = dict.fromkeys(protocol.seats, SleepyAgent())
    runs = []
    for concurrency in (1, 8, 64):
        episodes = asyncio.run(collect(protocol, team, environment(20), samples=2, seed=7, concurrency=concurrency))
        runs.append({episode.id: encode(episode) for episode in episodes})
    assert len(runs[0]) == 40
    assert runs[0] == runs[1] == runs[2]


def test_another_seed_another_result() -> None:
    team: Team = {"solver": SleepyAgent()}
    first, second = (asyncio.run(collect(Solo(), team, environment(1), seed=seed)) for seed in (0, 1))
    assert first[0].transcript != second[0].transcript


def test_simultaneous_turns_keep_the_order_of_the_protocol() -> None:
    arrived, seeds = list[str](), list[int]()
    spoken, waits_for = {seat: asyncio.Event() for seat in ("a", "b", "c")}, {"a": "b", "b": "c"}

    async def say(turn: Turn, seed: int) -> str:
        seeds.append(seed)
        if turn.seat in waits_for:
            await spoken[waits_for[turn.seat]].wait()
        arrived.append(turn.seat)
        if turn.seat in spoken:
            spoken[turn.seat].set()
        return turn.seat

    protocol = Debate(("a", "b", "c"), rounds=1)
    (episode,) = asyncio.run(collect(protocol, dict.fromkeys(protocol.seats, FunctionAgent(say)), environment(1)))
    assert arrived == ["c", "b", "a", "judge"]
    assert [step.seat for step in episode.transcript.steps] == ["a", "b", "c", "judge"]
    assert [step.text for step in episode.transcript.steps] == ["a", "b", "c", "judge"]
    assert len(set(seeds)) == 4


def test_play_returns_the_order_of_the_problems() -> None:
    episodes = play(Solo(), {"solver": SleepyAgent()}, environment(9), samples=2)
    assert [episode.id for episode in episodes] == [f"p{n}#{sample}" for n in range(9) for sample in (0, 1)]


def test_no_problems_no_episodes() -> None:
    assert play(Solo(), {"solver": SleepyAgent()}, environment(0)) == []


# Failures


def test_an_exception_is_recorded_on_its_episode_alone() -> None:
    episodes = play(Solo(), {"solver": failing_on(3)}, environment(40))
    assert [episode.id for episode in episodes if episode.error] == ["p3#0"]
    assert episodes[3].error == "RuntimeError: no answer to question 3"
    assert episodes[3].grade is None
    assert not episodes[3].transcript.steps
    assert all(episode.right for episode in episodes if not episode.error)


def test_a_text_that_cannot_be_stored_costs_its_own_episode_alone(tmp_path: Path) -> None:
    agent = ScriptedAgent(lambda turn, seed: "even\ud800" if question(turn) == "question 3" else "even")
    with EpisodeStore(tmp_path / "run", {}) as store:
        episodes = play(Solo(), {"solver": agent}, environment(40), store=store)
    assert [episode.id for episode in episodes if episode.error] == ["p3#0"]
    assert "surrogates not allowed" in str(episodes[3].error)


@pytest.mark.parametrize("protocol", [Solo("first"), Debate(judge="first")], ids=["alone", "simultaneous"])
def test_an_agent_that_was_cancelled_from_within_costs_its_own_episode_alone(protocol: ReasoningProtocol) -> None:
    async def say(turn: Turn, seed: int) -> str:
        if next(message.text for message in turn.messages if message.role == "user") == "question 3":
            raise asyncio.CancelledError
        return "even"

    episodes = play(protocol, dict.fromkeys(protocol.seats, FunctionAgent(say)), environment(40))
    assert [episode.id for episode in episodes] == [f"p{number}#0" for number in range(40)]
    assert [episode.id for episode in episodes if episode.error] == ["p3#0"]
    assert str(episodes[3].error).startswith("CancelledError")


def test_an_exception_of_the_grader_is_recorded_with_the_whole_transcript() -> None:
    agent = ScriptedAgent(["ungradable"])
    episode = asyncio.run(play_episode(Solo(), {"solver": agent}, LengthGrader(), Problem("p", "q", "a")))
    assert episode.error == "RuntimeError: the grader is broken"
    assert [step.text for step in episode.transcript.steps] == ["ungradable"]


def test_an_exception_calls_the_simultaneous_turns_off() -> None:
    async def say(turn: Turn, seed: int) -> str:
        if turn.seat != "a":
            await asyncio.Event().wait()
        raise RuntimeError(f"{turn.seat} failed")

    async def scenario() -> tuple[Episode, set["asyncio.Task[object]"]]:
        protocol = Debate(("a", "b"), rounds=1)
        team = dict.fromkeys(protocol.seats, FunctionAgent(say))
        episode = await play_episode(protocol, team, LengthGrader(), Problem("p", "q", "a"))
        return episode, other_tasks()

    episode, tasks = asyncio.run(scenario())
    assert episode.error == "RuntimeError: a failed"
    assert not tasks


def test_input_error_stops_the_run() -> None:
    with pytest.raises(InputError, match="no answer to question 5"):
        asyncio.run(collect(Solo(), {"solver": failing_on(5, error=InputError)}, environment(50), concurrency=4))


def test_input_error_of_a_simultaneous_turn_stops_the_run() -> None:
    protocol = Debate(("a", "b"), rounds=1)
    with pytest.raises(InputError, match="the script of seat 'b' has 0 line"):
        asyncio.run(
            collect(protocol, {"a": SleepyAgent(), "b": ScriptedAgent([]), "judge": SleepyAgent()}, environment(9))
        )


def test_input_error_stops_the_run_where_the_consumer_has_let_the_queue_fill() -> None:
    seen = list[str]()

    async def scenario() -> None:
        async with asyncio.timeout(600):
            team: Team = {"solver": failing_on(9, error=InputError)}
            async for episode in rollout(Solo(), team, environment(50), concurrency=2):
                seen.append(episode.id)
                await asyncio.sleep(0.005)  # the workers run ahead until the queue is full

    with pytest.raises(InputError, match="no answer to question 9"):
        asyncio.run(scenario())
    assert "p9#0" not in seen
    assert len(seen) == len(set(seen)) < 50


def test_too_many_failures_stop_the_run_early() -> None:
    calls: Counter[str] = Counter()
    agent = failing_on(*range(1000), calls=calls)
    expected = (
        r"^20 of 20 episodes failed, over the allowed share of 10%; "
        r"the first: p0#0: RuntimeError: no answer to question 0$"
    )
    with pytest.raises(InputError, match=expected):
        asyncio.run(collect(Solo(), {"solver": agent}, environment(1000), concurrency=1))
    assert calls.total() < 30


def test_too_many_failures_of_a_short_run_are_told_at_its_end() -> None:
    with pytest.raises(InputError, match="1 of 5 episodes failed, over the allowed share of 10%"):
        asyncio.run(collect(Solo(), {"solver": failing_on(0)}, environment(5)))


def test_failures_within_the_allowed_share_are_let_pass() -> None:
    async def scenario() -> int:
        stream = rollout(Solo(), {"solver": failing_on(0, 1)}, environment(4), max_failed_share=0.5)
        return len([episode async for episode in stream])

    assert asyncio.run(scenario()) == 4


def test_missing_seat() -> None:
    protocol = Debate(("long", "short"))
    expected = r"^no agent for seat\(s\) \['short', 'judge'\]; the team has \['long'\]$"
    with pytest.raises(InputError, match=expected):
        play(protocol, {"long": SleepyAgent()}, environment(1))


@pytest.mark.parametrize(("samples", "concurrency"), [(0, 1), (1, 0)])
def test_nothing_to_play(samples: int, concurrency: int) -> None:
    expected = f"samples and concurrency must be at least 1; got {samples} and {concurrency}"
    with pytest.raises(InputError, match=expected):
        play(Solo(), {"solver": SleepyAgent()}, environment(1), samples=samples, concurrency=concurrency)


# A consumer that leaves


@pytest.mark.parametrize("replies", [0, 1 + 8 + 8], ids=["at once", "with a full queue"])
def test_a_consumer_that_leaves_early_leaves_no_task(replies: int) -> None:
    """Of so many replies one was consumed, and at most 8 are on their way into a queue of 8."""
    said, all_said = 0, asyncio.Event()

    async def say(turn: Turn, seed: int) -> str:
        nonlocal said
        await asyncio.sleep(0)
        said += 1
        if said >= replies:
            all_said.set()
        return "even"

    async def scenario() -> set["asyncio.Task[object]"]:
        async with asyncio.timeout(600):
            team: Team = {"solver": FunctionAgent(say)}
            async with aclosing(rollout(Solo(), team, environment(100), concurrency=8)) as stream:
                async for _ in stream:
                    await all_said.wait()
                    break
            return other_tasks()

    assert not asyncio.run(scenario())


def test_a_plain_break_leaves_no_task_either() -> None:
    async def scenario() -> set["asyncio.Task[object]"]:
        async for _ in rollout(Solo(), {"solver": SleepyAgent()}, environment(100), concurrency=8):
            break
        for _ in range(10):  # the loop closes a generator that was dropped in a task of its own
            await asyncio.sleep(0)
        return other_tasks()

    assert not asyncio.run(scenario())


# Resuming


def test_resuming_plays_what_is_missing_and_what_failed(tmp_path: Path) -> None:
    first: Counter[str] = Counter()
    with EpisodeStore(tmp_path / "run", RUN) as store:
        play(Solo(), {"solver": failing_on(7, calls=first)}, environment(20), store=store)
    assert first == {f"question {n}": 1 for n in range(20)}

    second: Counter[str] = Counter()
    with EpisodeStore(tmp_path / "run", RUN) as store:
        episodes = play(Solo(), {"solver": failing_on(calls=second)}, environment(25), store=store)
    assert second == {f"question {n}": 1 for n in (7, 20, 21, 22, 23, 24)}
    assert [episode.id for episode in episodes] == [f"p{n}#0" for n in range(25)]
    assert all(episode.right for episode in episodes)


def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    protocol = Debate(("a", "b"), rounds=2)
    team: Team = dict.fromkeys(protocol.seats, SleepyAgent())
    unbroken = play(protocol, team, environment(12), samples=2, seed=3)
    with EpisodeStore(tmp_path / "run", RUN) as store:
        play(protocol, team, environment(5), samples=1, seed=3, store=store)
    with EpisodeStore(tmp_path / "run", RUN) as store:
        assert play(protocol, team, environment(12), samples=2, seed=3, store=store) == unbroken


def test_an_episode_is_in_the_store_before_it_is_yielded(tmp_path: Path) -> None:
    async def scenario(store: EpisodeStore) -> None:
        async for episode in rollout(Solo(), {"solver": SleepyAgent()}, environment(10), store=store):
            assert episode.id in store.ids
            assert episode in list(store)

    with EpisodeStore(tmp_path / "run", RUN) as store:
        asyncio.run(scenario(store))
