"""Written conversations are those that the protocol would have had."""

import pytest

from turnwise.agents.chat import ChatTemplate
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Turn
from turnwise.protocols.debate import Debate
from turnwise.protocols.graph import GraphProtocol, State, TurnGraph
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.rewards import Correctness, RewardSum
from turnwise.protocols.solo import Solo
from turnwise.rl.demonstrations import demonstrate, tokenised
from turnwise.rl.tiny_models import build_tokenizer

PROBLEM = Problem("p", "What is 7×3?", "21")
THINK, RETHINK, ANSWER = "<think>so</think>", "<answer>hm</rethink>", r"<answer>\boxed{21}</answer>"


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(build_tokenizer())


def test_the_protocol_asks_and_its_tags_end_the_turns() -> None:
    lines = iter([THINK, RETHINK, THINK, ANSWER])
    asked = list[Turn]()

    def say(turn: Turn) -> str:
        asked.append(turn)
        return next(lines)

    said = demonstrate(LongShort(), PROBLEM, say)
    assert [turn for turn, _ in said] == asked
    assert [(turn.seat, reply) for turn, reply in said] == [
        ("long", Reply(THINK, 0, "stop", "</think>")), ("short", Reply(RETHINK, 0, "stop", "</rethink>")),
        ("long", Reply(THINK, 0, "stop", "</think>")), ("short", Reply(ANSWER, 0, "stop", "</answer>")),
    ]  # fmt: skip
    assert [message.text for message in asked[3].messages[2:]] == [THINK, RETHINK, THINK]


def test_a_turn_that_was_begun_for_a_seat_is_gone_on_with() -> None:
    lines = {"long": THINK, "short": r" \boxed{21}</answer>"}
    said = demonstrate(LongShort(max_turns=2), PROBLEM, lambda turn: lines[turn.seat])
    assert [turn.prefill + reply.text for turn, reply in said] == [THINK, r"<answer>Final answer: \boxed{21}</answer>"]

    begun = State(seat="first", prefill="So: ", then="second")
    graph = TurnGraph(
        seats={"first": "", "second": ""}, start="begun", states={"begun": begun, "second": State(seat="second")}
    )
    said = demonstrate(GraphProtocol(graph, RewardSum((Correctness(),))), PROBLEM, lambda turn: turn.seat)
    assert "".join(message.text for message in said[1][0].messages).endswith("So: first")


def test_a_text_that_no_tag_closes_ends_by_itself() -> None:
    said = demonstrate(Solo("long", stops=("</answer>",)), PROBLEM, lambda turn: "</answer> 21")
    assert [reply for _, reply in said] == [Reply("</answer> 21", 0, "end", None)]


def test_simultaneous_turns_cannot_be_written() -> None:
    with pytest.raises(InputError, match=r"^a conversation is written one turn at a time; here 2 are simultaneous$"):
        demonstrate(Debate(), PROBLEM, lambda turn: "21")


def test_a_seat_learns_what_it_says_and_the_end_of_it(template: ChatTemplate) -> None:
    lines = iter([THINK, RETHINK, THINK, r"\boxed{21}"])
    # What opens with no tag closes with none, and the dialogue goes on from it: to the cap.
    said = demonstrate(LongShort(max_turns=4), PROBLEM, lambda turn: next(lines))
    decode = template.tokenizer.decode

    def taught(*seats: str) -> list[list[str]]:
        return [
            [decode(sequence.token_ids[first:last]) for first, last in sequence.said]
            for sequence in tokenised(said, template, seats)
        ]

    assert taught("long") == [[THINK, THINK]]
    assert taught("short") == [[RETHINK, r"\boxed{21}" + template.tokenizer.eos_token]]
    assert taught() == []
