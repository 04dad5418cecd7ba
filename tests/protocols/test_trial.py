from collections.abc import Mapping, Sequence

import pytest

from turnwise.environments.episode import Episode
from turnwise.environments.transcript import Transcript, Turn
from turnwise.protocols.debate import Debate, Panel
from turnwise.protocols.gated import Gated
from turnwise.protocols.graph import GraphProtocol
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.protocols.rewards import Format, Reward, RewardSum
from turnwise.protocols.solo import Solo
from turnwise.protocols.thinkless import Thinkless
from turnwise.protocols.trial import try_out

SHIPPED = [LongShort(), Thinkless(), Gated(), Solo(), Debate(rounds=3), Panel()]


@pytest.mark.parametrize("protocol", SHIPPED, ids=[type(one).__name__ for one in SHIPPED])
def test_shipped_protocols_have_no_faults_and_reach_their_worst_case(protocol: GraphProtocol) -> None:
    trial = try_out(protocol)
    assert trial.faults == ()
    turns, tokens = protocol.graph.worst_case()
    assert 1 <= trial.fewest_turns <= trial.most_turns == turns
    assert trial.most_tokens <= tokens
    assert trial == try_out(protocol)


def test_a_reward_that_does_not_know_a_seat() -> None:
    reward = RewardSum((Format({"other": (("<a>",), ("</a>",))}),))
    trial = try_out(Solo(reward=reward))
    assert len(trial.faults) == 1
    assert trial.faults[0].startswith("InputError: no tags for seat 'solver'")


class Faulty(ReasoningProtocol):
    """Breaks the interface's promises, one at a time."""

    seats = ("a", "b")

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def next_turns(self, transcript: Transcript) -> list[Turn]:
        turn = Turn("a", "state", (), (), 1)
        if self.fault == "never ends":
            return [turn]
        if self.fault == "raises":
            raise RuntimeError("broken")
        if transcript.steps or self.fault == "nobody":
            return []
        return [turn, turn] if self.fault == "twice" else [turn]

    def answer(self, transcript: Transcript) -> str:
        return None if self.fault == "no text" else "2"  # type: ignore[return-value]

    def rewards(self, group: Sequence[Episode], step: int = 0) -> list[Mapping[str, Reward]]:
        paid = Reward({"term": float("nan") if self.fault == "nan" else 1.0})
        seats = ("a",) if self.fault == "unpaid" else self.seats
        return [dict.fromkeys(seats, paid) for _ in group]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("never ends", "ValueError: a conversation had not ended after 10000 turns"),
        ("raises", "RuntimeError: broken"),
        ("nobody", "ValueError: nobody speaks"),
        ("twice", "ValueError: seats speak twice at once: ['a', 'a']"),
        ("no text", "TypeError: the answer must be a text; got None"),
        ("unpaid", "ValueError: seat(s) ['b'] are not paid a finite number"),
        ("nan", "ValueError: seat(s) ['a', 'b'] are not paid a finite number"),
    ],
)
def test_each_broken_promise_is_a_fault(fault: str, message: str) -> None:
    assert try_out(Faulty(fault), conversations=2).faults == (message,)


def test_a_protocol_that_is_no_graph_can_be_tried_too() -> None:
    trial = try_out(Faulty(""), conversations=3)
    assert (trial.conversations, trial.fewest_turns, trial.most_turns, trial.faults) == (3, 1, 1, ())
