from collections.abc import Callable

import pytest

from turnwise.environments.transcript import Message, Transcript, Turn
from turnwise.protocols.gated import Gated
from turnwise.protocols.long_short import LONG_INSTRUCTION, SHORT_INSTRUCTION, LongShort

Converse = Callable[..., Transcript]
QUESTION = Message("user", "1 + 1?")


def test_the_router_reads_the_bare_question(converse: Converse) -> None:
    protocol = Gated()
    assert protocol.seats == ("router", "long", "short")
    assert protocol.next_turns(converse(protocol)) == [Turn("router", "gate", (QUESTION,), ("<think>", "<short>"), 1)]


def test_short_has_the_short_seat_answer_alone(converse: Converse) -> None:
    protocol = Gated(LongShort(short_tokens=33))
    assert protocol.next_turns(converse(protocol, "<short>")) == [
        Turn("short", "alone", (Message("system", SHORT_INSTRUCTION), QUESTION), ("</answer>",), 33)
    ]
    said = converse(protocol, "<short>", "<answer> \\boxed{2} </answer>")
    assert [(step.seat, step.text) for step in said.steps] == [
        ("router", "<short>"),
        ("short", "<answer> \\boxed{2} </answer>"),
    ]
    assert protocol.next_turns(said) == []
    assert protocol.answer(said) == "<answer> \\boxed{2} </answer>"


def test_think_opens_the_dialogue_which_never_sees_the_routers_token(converse: Converse) -> None:
    protocol, inner = Gated(), LongShort()
    texts = ["<think> a </think>", "<answer> b </rethink>", "<think> c </think>", "<answer> \\boxed{2} </answer>"]
    gated, bare = converse(protocol, "<think>", *texts), converse(inner, *texts)
    assert gated.steps[1:] == bare.steps
    for length in range(5):
        assert protocol.next_turns(gated.prefix(length + 1)) == inner.next_turns(bare.prefix(length))
    (turn,) = protocol.next_turns(gated.prefix(1))
    assert turn.messages == (Message("system", LONG_INSTRUCTION), QUESTION)


def test_the_cap_of_the_dialogue_is_kept(converse: Converse) -> None:
    protocol = Gated(LongShort(max_turns=4))
    said = converse(protocol, "<think>", "</think>", "</rethink>", "</think>")
    (turn,) = protocol.next_turns(said)
    assert (turn.seat, turn.state, turn.prefill) == ("short", "conclude", "<answer>Final answer:")
    assert len(turn.messages) == 2 + 3
    assert protocol.next_turns(converse(protocol, "<think>", "</think>", "</rethink>", "</think>", "2")) == []
    assert Gated(LongShort(max_turns=4)).graph.worst_case() == (5, 1 + 2 * 1024 + 2 * 512)


@pytest.mark.parametrize("text", ["", "Well,", "</think>"])
def test_without_a_token_of_the_routers_the_dialogue_never_opens(converse: Converse, text: str) -> None:
    protocol = Gated()
    said = converse(protocol, text)
    assert protocol.next_turns(said) == []
    assert protocol.answer(said) == text


def test_the_gate_alone_is_of_control_tokens() -> None:
    assert Gated().control_states == {"gate"}
    assert LongShort().control_states == frozenset()
