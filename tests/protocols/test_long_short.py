import inspect
from collections.abc import Callable

import pytest

from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.transcript import Message, Reply, Transcript
from turnwise.protocols.long_short import LONG_INSTRUCTION, SHORT_INSTRUCTION, LongShort

Converse = Callable[..., Transcript]
QUESTION = Message("user", "1 + 1?")


def spoken(transcript: Transcript) -> list[tuple[str, str, str]]:
    return [(step.seat, step.state, step.text) for step in transcript.steps]


def test_the_papers_example(converse: Converse) -> None:
    protocol = LongShort()
    said = converse(
        protocol,
        "<think> Hard. </think> ignored",
        "<answer> Easy. </rethink> ignored",
        "<think> Again. </think>",
        "<answer> \\boxed{2} </answer> ignored",
    )
    assert spoken(said) == [
        ("long", "think", "<think> Hard. </think>"),
        ("short", "answer", "<answer> Easy. </rethink>"),
        ("long", "think", "<think> Again. </think>"),
        ("short", "answer", "<answer> \\boxed{2} </answer>"),
    ]
    assert protocol.next_turns(said) == []
    assert protocol.answer(said) == "<answer> \\boxed{2} </answer>"
    assert said.token_count == 3 + 3 + 3 + 3


def test_what_each_seat_reads(converse: Converse) -> None:
    protocol = LongShort(long_tokens=100, short_tokens=50)
    said = converse(protocol, "<think> Hard. </think>", "<answer> Easy. </rethink>")
    thought = Message(
        "assistant",
        "<think> Hard. </think>",
        Reply("<think> Hard. </think>", 3, "stop", "</think>", model="scripted long"),
    )
    eased = Message(
        "assistant",
        "<answer> Easy. </rethink>",
        Reply("<answer> Easy. </rethink>", 3, "stop", "</rethink>", model="scripted short"),
    )
    (first,), (second,), (third,) = (protocol.next_turns(said.prefix(length)) for length in range(3))
    assert first.messages == (Message("system", LONG_INSTRUCTION), QUESTION)
    assert second.messages == (Message("system", SHORT_INSTRUCTION), QUESTION, thought)
    assert third.messages == (Message("system", LONG_INSTRUCTION), QUESTION, thought, eased)
    assert [(turn.stops, turn.max_tokens, turn.prefill) for turn in (first, second)] == [
        (("</think>",), 100, ""),
        (("</answer>", "</rethink>"), 50, ""),
    ]


@pytest.mark.parametrize("last", ["long", "short"])
def test_each_instruction_names_its_tags_and_its_role(last: str) -> None:
    instruction = LongShort().graph.seats[last]
    for tag in ("<think>", "</think>", "<answer>", "</answer>", "</rethink>", "\\boxed{}"):
        assert tag in instruction
    assert instruction.count(f"You are the {last}-thought assistant") == 1
    assert instruction.count("You are the") == 1


def test_rethink_reopens_until_the_cap_where_the_short_seat_must_answer(converse: Converse) -> None:
    protocol = LongShort(max_turns=6)
    said = converse(protocol, *["<think></think>", "<answer></rethink>"] * 2, "<think></think>")
    (turn,) = protocol.next_turns(said)
    assert (turn.seat, turn.state, turn.stops) == ("short", "conclude", ("</answer>",))
    assert turn.prefill == "<answer>Final answer:"
    assert len(turn.messages) == 7
    ended = converse(
        protocol, *["<think></think>", "<answer></rethink>"] * 2, "<think></think>", " \\boxed{2}</answer>"
    )
    assert protocol.next_turns(ended) == []
    assert protocol.answer(ended) == "<answer>Final answer: \\boxed{2}</answer>"
    asked_again = converse(protocol, *["<think></think>", "<answer></rethink>"] * 3)
    assert asked_again.steps[-1].text == "<answer>Final answer:<answer></rethink>"
    assert protocol.next_turns(asked_again) == []


def test_an_odd_cap_has_the_short_seat_answer_twice_in_a_row(converse: Converse) -> None:
    protocol = LongShort(max_turns=3)
    said = converse(protocol, "</think>", "</rethink>", "2</answer>")
    assert [(step.seat, step.state) for step in said.steps] == [
        ("long", "think"),
        ("short", "answer"),
        ("short", "conclude"),
    ]
    assert protocol.next_turns(said) == []


def test_a_thought_that_is_cut_off_is_closed_for_its_reader(converse: Converse) -> None:
    protocol = LongShort(long_tokens=3)
    said = converse(protocol, "<think> one two three four </think>")
    assert said.steps[0].reply == Reply("<think> one two", 3, "length", model="scripted long")
    (turn,) = protocol.next_turns(said)
    assert [message.text for message in turn.messages[2:]] == ["<think> one two", "</think>"]


def test_an_answer_without_a_tag_ends_the_dialogue(converse: Converse) -> None:
    protocol = LongShort()
    said = converse(protocol, "</think>", "I am lost")
    assert protocol.next_turns(said) == []
    assert protocol.answer(said) == "I am lost"


def test_it_pays_for_right_answers_for_form_and_for_brevity(converse: Converse) -> None:
    protocol = LongShort()
    brief = converse(protocol, "<think> a </think>", "<answer> \\boxed{2} </answer>")
    wordy = converse(protocol, "<think> a b c d </think>", "<answer> \\boxed{2}")
    group = [Episode(brief, 0, 0, Grade(Outcome.RIGHT, "2")), Episode(wordy, 1, 0, Grade(Outcome.UNPARSABLE))]
    (good, bad) = protocol.rewards(group)
    assert good["long"].terms == good["short"].terms == {"correctness": 1.0, "format": 1.0, "kimi length": 0.5}
    assert bad["long"].terms == {"correctness": 0.0, "format": 1.0, "kimi length": -0.5}
    assert bad["short"].terms == {"correctness": 0.0, "format": 0.0, "kimi length": -0.5}


def test_the_protocol_takes_at_most_60_lines_of_code() -> None:
    lines = inspect.getsource(LongShort).splitlines()
    assert 10 < len([line for line in lines if line.strip()]) <= 60
    module = inspect.getsource(inspect.getmodule(LongShort) or LongShort).splitlines()
    assert len([line for line in module if line.strip() and not line.strip().startswith("#")]) <= 60
