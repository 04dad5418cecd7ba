"""What every shipped protocol keeps to, whatever its agents say."""

import ast
import asyncio
import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.agents.scripted import ScriptedAgent
from turnwise.environments.environment import Grade, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Message, Turn
from turnwise.named import open_protocol
from turnwise.protocols.debate import Debate, Panel
from turnwise.protocols.gated import Gated
from turnwise.protocols.graph import GraphProtocol
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.solo import Solo
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.rollout import play_episode

EXAMPLE = Path(__file__).parents[2] / "examples" / "new_protocol.py"


# Small budgets, so that turns are cut off as often as not.
PROTOCOLS = {
    "long short": LongShort(max_turns=5, long_tokens=6, short_tokens=4),
    "long short, even cap": LongShort(max_turns=4, long_tokens=6, short_tokens=4),
    "thinkless": Thinkless(short_tokens=4, think_tokens=6),
    "thinkless, short": Thinkless(short_tokens=4, mode="short"),
    "thinkless, think": Thinkless(think_tokens=6, mode="think"),
    "gated": Gated(LongShort(max_turns=3, long_tokens=6, short_tokens=4)),
    "solo": Solo(max_tokens=5),
    "solo, with tags": Solo("long", max_tokens=6, stops=("</answer>",), prefill="<think>", answer_after="</think>"),
    "debate": Debate(("ann", "bob", "cleo"), rounds=3, max_tokens=5),
    "panel": Panel(max_tokens=5),
    "jury": open_protocol(f"{EXAMPLE}:jury"),
}

TAGS = ["<think>", "</think>", "<short>", "<answer>", "</answer>", "<rethink>", "</rethink>"]
words = st.sampled_from([*TAGS, "so", "2", "\\boxed{2}", "a < b", "⊗", "\n\n", ""])
texts = st.builds(" ".join, st.lists(words, max_size=9)) | st.builds("".join, st.lists(words, max_size=4))
scripts = st.lists(texts, min_size=1, max_size=6)
outcomes = st.sampled_from(Outcome)

contract = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
quickly = settings(max_examples=50)


class GivenGrade(Grader):
    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.texts: list[str] = []

    async def grade(self, problem: Problem, text: str) -> Grade:
        self.texts.append(text)
        return Grade(self.outcome)


def played(
    protocol: GraphProtocol, script: list[str], seed: int = 0, outcome: Outcome = Outcome.WRONG
) -> tuple[Episode, list[Turn]]:
    """An episode in which each turn says any of the script's texts, and the turns that were asked for."""
    asked: list[Turn] = []

    def say(turn: Turn, turn_seed: int) -> str:
        asked.append(turn)
        return random.Random(turn_seed).choice(script)

    team = dict.fromkeys(protocol.seats, ScriptedAgent(say))
    problem = Problem("p", "1 + 1?", "2", choices=("2", "3"))
    episode = asyncio.run(play_episode(protocol, team, GivenGrade(outcome), problem, seed=seed))
    assert episode.error is None
    return episode, asked


@contract
class TestContract:
    @quickly
    @given(script=scripts, seed=st.integers(0, 2**32))
    def test_it_ends_within_its_worst_case(self, protocol: GraphProtocol, script: list[str], seed: int) -> None:
        episode, asked = played(protocol, script, seed)
        turns, tokens = protocol.graph.worst_case()
        assert 1 <= len(episode.transcript.steps) == len(asked) <= turns
        assert episode.transcript.token_count <= tokens
        assert protocol.next_turns(episode.transcript) == []

    @quickly
    @given(script=scripts, seed=st.integers(0, 2**32))
    def test_every_prefix_asks_again_for_what_was_said(
        self, protocol: GraphProtocol, script: list[str], seed: int
    ) -> None:
        episode, asked = played(protocol, script, seed)
        for length, step in enumerate(episode.transcript.steps):
            turns = protocol.next_turns(episode.transcript.prefix(length))
            assert (turns[0].seat, turns[0].state, turns[0].prefill) == (step.seat, step.state, step.prefill)
            assert turns == asked[length : length + len(turns)]
            assert len({turn.seat for turn in turns}) == len(turns)

    @quickly
    @given(script=scripts, seed=st.integers(0, 2**32))
    def test_every_prefix_has_an_answer(self, protocol: GraphProtocol, script: list[str], seed: int) -> None:
        episode, _ = played(protocol, script, seed)
        for length in range(len(episode.transcript.steps) + 1):
            said = episode.transcript.prefix(length)
            assert protocol.answer(said) in (said.steps[-1].text if said.steps else "")

    @quickly
    @given(script=scripts, graded=st.lists(outcomes, min_size=1, max_size=4))
    def test_every_seat_is_paid_in_every_episode(
        self, protocol: GraphProtocol, script: list[str], graded: list[Outcome]
    ) -> None:
        group = [played(protocol, script, seed, outcome)[0] for seed, outcome in enumerate(graded)]
        rewards = protocol.rewards(group)
        assert [tuple(reward) for reward in rewards] == [protocol.seats] * len(group)
        assert all(-1e6 < paid.total < 1e6 for reward in rewards for paid in reward.values())

    def test_one_problem_is_asked_of_the_first_seats(self, protocol: GraphProtocol) -> None:
        _, asked = played(protocol, ["2"])
        assert asked[0].state == protocol.graph.start
        assert Message("user", "1 + 1?\n(A) 2\n(B) 3") in asked[0].messages

    def test_it_can_be_pickled(self, protocol: GraphProtocol) -> None:
        again = pickle.loads(pickle.dumps(protocol))
        said = played(protocol, ["2 </think>", "</rethink>"])[0].transcript.prefix(1)
        assert again.next_turns(said) == protocol.next_turns(said)
        assert type(again) is type(protocol)


@pytest.mark.parametrize("name", [name for name, p in PROTOCOLS.items() if p.graph.dialogue == "shared"])
@quickly
@given(script=scripts, seed=st.integers(0, 2**32))
def test_what_a_seat_has_read_and_said_in_a_shared_dialogue_stays(name: str, script: list[str], seed: int) -> None:
    episode, asked = played(PROTOCOLS[name], script, seed)
    before: dict[str, tuple[Message, ...]] = {}
    for turn, step in zip(asked, episode.transcript.steps, strict=True):
        known = before.get(turn.seat, ())
        assert turn.messages[: len(known)] == known
        begun = (Message("assistant", turn.prefill),) if turn.prefill else ()
        before[turn.seat] = (*turn.messages, *begun, Message("assistant", step.reply.text, step.reply))


def test_the_grader_gets_the_protocols_answer() -> None:
    protocol, grader = Solo(answer_after="</think>"), GivenGrade(Outcome.RIGHT)
    team = {"solver": ScriptedAgent(["a </think> b"])}
    episode = asyncio.run(play_episode(protocol, team, grader, Problem("p", "1 + 1?", "2")))
    assert episode.right
    assert grader.texts == [" b"]


def test_the_example_describes_its_protocol_in_15_lines() -> None:
    (jury,) = (
        node
        for node in ast.parse(EXAMPLE.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "jury"
    )
    assert (jury.end_lineno or 0) - jury.lineno + 1 <= 15
