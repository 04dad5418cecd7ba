import asyncio
import random

import pytest

from turnwise.agents.replay import BranchingAgent, ReplayAgent
from turnwise.agents.scripted import ScriptedAgent
from turnwise.environments.environment import Environment, Grade, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Message, Reply, Turn
from turnwise.protocols.debate import Debate
from turnwise.protocols.graph import GraphProtocol
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.solo import Solo
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.rollout import Team, play


class Exact(Grader):
    async def grade(self, problem: Problem, text: str) -> Grade:
        return Grade(Outcome.RIGHT if problem.answer in text else Outcome.WRONG, text)


ENVIRONMENT = Environment("four", [Problem(f"p{n}", f"1 + {n}?", str(1 + n)) for n in range(4)], Exact())


def say(turn: Turn, seed: int) -> Reply:
    """A random text with token ids and log-probabilities, such as an engine returns."""
    rng = random.Random(seed)
    stop = rng.choice([*turn.stops, None])
    ids = tuple(rng.randrange(100) for _ in range(rng.randint(1, 5)))
    text = " ".join(map(str, ids)) + (stop or "")
    return Reply(
        text, len(ids), "stop" if stop else "end", stop, ids, tuple(-i / 7 for i in ids), (1, 2), "abc", "m", 3
    )


def played(protocol: GraphProtocol, *, seed: int = 5) -> list[Episode]:
    return play(protocol, dict.fromkeys(protocol.seats, ScriptedAgent(say)), ENVIRONMENT, samples=3, seed=seed)


def replay(protocol: GraphProtocol, episodes: list[Episode], *, seed: int = 5, samples: int = 3) -> list[Episode]:
    team: Team = dict.fromkeys(protocol.seats, ReplayAgent(episodes))
    return play(protocol, team, ENVIRONMENT, samples=samples, seed=seed, concurrency=2)


@pytest.mark.parametrize("protocol", [LongShort(), Thinkless(), Debate()], ids=lambda p: type(p).__name__)
def test_a_stored_run_is_said_again_exactly(protocol: GraphProtocol) -> None:
    episodes = played(protocol)
    assert len({episode.transcript.text for episode in episodes}) == 12
    assert replay(protocol, episodes) == episodes
    assert replay(protocol, list(reversed(episodes))) == episodes


def test_a_part_of_the_samples_can_be_replayed() -> None:
    episodes = played(LongShort())
    assert replay(LongShort(), episodes, samples=1) == episodes[::3]


def test_one_seat_can_be_replayed_beside_another_agent() -> None:
    episodes = played(LongShort())
    team: Team = {"long": ReplayAgent(episodes), "short": ScriptedAgent(say)}
    assert play(LongShort(), team, ENVIRONMENT, samples=3, seed=5) == episodes


def test_another_seed_is_refused() -> None:
    with pytest.raises(InputError, match=r"no stored episode holds this turn of seat 'long'.*with the same seed"):
        replay(LongShort(), played(LongShort()), seed=6)


def test_more_samples_than_are_stored_are_refused() -> None:
    with pytest.raises(InputError, match="no stored episode holds this turn"):
        replay(LongShort(), played(LongShort()), samples=4)


def test_another_problem_is_refused() -> None:
    episodes = [episode for episode in played(LongShort()) if episode.transcript.problem.id != "p2"]
    with pytest.raises(InputError, match="replay the same problems"):
        replay(LongShort(), episodes)


def test_another_protocol_is_refused() -> None:
    with pytest.raises(InputError, match="is of seat 'first' in state 'round 1', not of 'long' in 'think'"):
        replay(LongShort(), played(Debate()))


def test_another_protocol_of_the_same_seat_is_refused() -> None:
    with pytest.raises(InputError, match="in state 'route', not of 'solver' in 'solve': replay the same protocol"):
        replay(Solo(), played(Thinkless()))


class TestBranching:
    TURN = Turn("b", "s", (Message("user", "1 + 1?"), Message("assistant", "x", Reply("x", 1, token_ids=(4,)))), (), 9)

    def said(self, turn: Turn, seed: int = 7) -> str:
        agent = BranchingAgent(ScriptedAgent(["anew"] * 9), {7: (self.TURN, Reply("as before", 2))})
        return asyncio.run(agent.reply(turn, seed)).text

    def test_the_same_turn_gets_the_same_reply(self) -> None:
        assert self.said(self.TURN) == "as before"
        # The tokens are what is read; how likely they were, and to whom, is not.
        reply = Reply("x", 1, token_ids=(4,), log_probabilities=(-0.5,), prompt_token_ids=(1,), model="m", version=2)
        assert self.said(self.TURN._replace(messages=(self.TURN.messages[0], Message("assistant", "x", reply)))) == (
            "as before"
        )

    @pytest.mark.parametrize(
        "change",
        [
            {"seat": "a"},
            {"state": "t"},
            {"messages": TURN.messages[:1]},
            {"messages": (TURN.messages[0], Message("assistant", "x"))},
            {"messages": (TURN.messages[0], Message("assistant", "x", Reply("x", 1, token_ids=(5,))))},
            {"stops": ("</s>",)},
            {"max_tokens": 8},
            {"prefill": "<s>"},
        ],
    )
    def test_any_other_turn_is_taken_anew(self, change: dict[str, object]) -> None:
        assert self.said(self.TURN._replace(**change)) == "anew"

    def test_another_seed_is_another_turn(self) -> None:
        assert self.said(self.TURN, seed=8) == "anew"
