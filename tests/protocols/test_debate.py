from collections.abc import Callable

import pytest

from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Message, Transcript
from turnwise.protocols.debate import Debate, Panel

Converse = Callable[..., Transcript]

SOLVE = ("system", "Solve the problem step by step. Put your final answer in \\boxed{}.")
REVISE = (
    "user",
    "Read what the others wrote, find the mistakes in it and in your own answer, and answer again in \\boxed{}.",
)
CONCLUDE = ("user", "Weigh the answers above against each other and give the final answer in \\boxed{}.")
QUESTION = ("user", "1 + 1?")


def read(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in messages]


def test_a_debate_of_two_rounds(converse: Converse) -> None:
    protocol = Debate(max_tokens=9)
    said = converse(protocol, ["It is 2.", "It is 3."], ["Still 2.", "2 then."], "\\boxed{2}")
    assert [(step.seat, step.state, step.text) for step in said.steps] == [
        ("first", "round 1", "It is 2."),
        ("second", "round 1", "It is 3."),
        ("first", "round 2", "Still 2."),
        ("second", "round 2", "2 then."),
        ("judge", "judge", "\\boxed{2}"),
    ]
    assert protocol.next_turns(said) == []
    assert protocol.answer(said) == "\\boxed{2}"
    first, second = protocol.next_turns(said.prefix(0))
    assert (first.seat, second.seat) == ("first", "second")
    assert read(first.messages) == read(second.messages) == [SOLVE, QUESTION]
    first, second = protocol.next_turns(said.prefix(2))
    assert read(first.messages) == [SOLVE, QUESTION, ("assistant", "It is 2."), ("user", "second: It is 3."), REVISE]
    assert read(second.messages) == [SOLVE, QUESTION, ("user", "first: It is 2."), ("assistant", "It is 3."), REVISE]
    (judge,) = protocol.next_turns(said.prefix(4))
    assert read(judge.messages) == [
        QUESTION,
        ("user", "first: It is 2."),
        ("user", "second: It is 3."),
        ("user", "first: Still 2."),
        ("user", "second: 2 then."),
        CONCLUDE,
    ]
    assert {turn.max_tokens for turn in (first, second, judge)} == {9}


def test_who_answers_second_in_a_round_has_not_heard_the_first(converse: Converse) -> None:
    protocol = Debate(("a", "b", "c"))
    both = protocol.next_turns(converse(protocol))
    assert protocol.next_turns(converse(protocol, ["It is 2."])) == both[1:]
    assert [read(turn.messages) for turn in both] == [[SOLVE, QUESTION]] * 3


@pytest.mark.parametrize(("rounds", "turns"), [(1, 3), (2, 5), (4, 9)])
def test_rounds(rounds: int, turns: int) -> None:
    graph = Debate(rounds=rounds).graph
    assert list(graph.states) == [*(f"round {number}" for number in range(1, rounds + 1)), "judge"]
    assert graph.worst_case() == (turns, turns * 1024)


def test_a_debate_needs_a_round() -> None:
    with pytest.raises(InputError, match="at least one round; got 0"):
        Debate(rounds=0)


def test_a_panel_is_one_round_and_a_chair(converse: Converse) -> None:
    protocol = Panel()
    said = converse(protocol, ["2", "3", "2"], "\\boxed{2}")
    assert [step.seat for step in said.steps] == ["first", "second", "third", "chair"]
    (chair,) = protocol.next_turns(said.prefix(3))
    assert read(chair.messages) == [
        QUESTION,
        ("user", "first: 2"),
        ("user", "second: 3"),
        ("user", "third: 2"),
        CONCLUDE,
    ]
    assert protocol.next_turns(said) == []
    assert protocol.seats == ("first", "second", "third", "chair")
