from collections.abc import Callable
from typing import Literal

import pytest

from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Message, Reply, Step, Transcript, Turn
from turnwise.protocols.rewards import SHORT, THINK, mode_of
from turnwise.protocols.thinkless import Thinkless

Converse = Callable[..., Transcript]
QUESTION = Message("user", "1 + 1?")


def paid(protocol: Thinkless, transcript: Transcript, outcome: Outcome = Outcome.RIGHT) -> float:
    return protocol.rewards([Episode(transcript, 0, 0, Grade(outcome))])[0]["solver"].total


def test_the_first_turn_is_one_token_and_no_instruction_is_given(converse: Converse) -> None:
    assert Thinkless().next_turns(converse(Thinkless())) == [
        Turn("solver", "route", (QUESTION,), ("<short>", "<think>"), max_tokens=1)
    ]


@pytest.mark.parametrize(
    ("token", "state", "budget", "text", "answer", "reward"),
    [
        ("<short>", "short", 2048, "It is \\boxed{2}.", "It is \\boxed{2}.", 1.0),
        ("<think>", "think", 24576, "Hm. </think> It is \\boxed{2}.", " It is \\boxed{2}.", 0.5),
    ],
)
def test_a_mode_is_chosen_and_the_answer_continues_its_token(
    converse: Converse, token: str, state: str, budget: int, text: str, answer: str, reward: float
) -> None:
    protocol = Thinkless()
    chosen = converse(protocol, token)
    reply = Reply(token, 1, "stop", token, model="scripted solver")
    assert chosen.steps == (Step("solver", "route", reply),)
    assert protocol.next_turns(chosen) == [
        Turn("solver", state, (QUESTION, Message("assistant", token, reply)), (), max_tokens=budget)
    ]
    ended = converse(protocol, token, text)
    assert ended.text == token + text
    assert protocol.next_turns(ended) == []
    assert protocol.answer(ended) == answer
    assert mode_of(ended) == token
    assert paid(protocol, ended) == reward
    assert paid(protocol, ended, Outcome.WRONG) == -1.0


def test_the_mode_is_the_first_token_and_not_a_mention(converse: Converse) -> None:
    protocol = Thinkless()
    mentions = converse(protocol, "<think>", "I could say <short> here. </think> \\boxed{2} <short>")
    assert [step.state for step in mentions.steps] == ["route", "think"]
    assert mode_of(mentions) == THINK
    assert paid(protocol, mentions) == 0.5
    # As where the token's text is spelled out by others, so that the reply did not stop at it.
    spelled = Transcript(Problem("p", "1 + 1?", "2"), (Step("solver", "route", Reply("<short>", 1, "length")),))
    assert mode_of(spelled) is None
    assert protocol.next_turns(spelled) == []


def test_without_a_mode_the_episode_is_over_and_wrong(converse: Converse) -> None:
    protocol = Thinkless()
    said = converse(protocol, "Well, \\boxed{2}")
    assert [step.text for step in said.steps] == ["Well,"]
    assert protocol.next_turns(said) == []
    assert paid(protocol, said) == -1.0


def test_a_thought_that_is_cut_off_is_no_answer(converse: Converse) -> None:
    protocol = Thinkless(think_tokens=3)
    said = converse(protocol, "<think>", "It is \\boxed{2} surely </think> \\boxed{2}")
    assert said.steps[1].reply.finish == "length"
    assert said.steps[1].text == "It is \\boxed{2}"
    assert protocol.answer(said) == ""


@pytest.mark.parametrize(
    ("mode", "token", "budget", "text", "answer", "reward"),
    [
        ("short", SHORT, 7, "\\boxed{2}", "<short>\\boxed{2}", 1.0),
        ("think", THINK, 9, "hm </think> \\boxed{2}", " \\boxed{2}", 0.5),
        ("think", THINK, 9, "hm \\boxed{2}", "", 0.5),
    ],
)
def test_a_mode_can_be_forced(
    converse: Converse, mode: Literal["short", "think"], token: str, budget: int, text: str, answer: str, reward: float
) -> None:
    protocol = Thinkless(short_tokens=7, think_tokens=9, mode=mode)
    assert protocol.next_turns(converse(protocol)) == [Turn("solver", mode, (QUESTION,), (), budget, prefill=token)]
    said = converse(protocol, text)
    assert said.text == token + text
    assert protocol.next_turns(said) == []
    assert protocol.answer(said) == answer
    assert mode_of(said) == token
    assert paid(protocol, said) == reward
    assert protocol.graph.worst_case() == (1, budget)


def test_the_first_turn_alone_is_of_control_tokens_and_a_forced_mode_has_none() -> None:
    assert Thinkless().control_states == {"route"}
    assert Thinkless(mode="short").control_states == Thinkless(mode="think").control_states == frozenset()
