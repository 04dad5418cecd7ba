import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.agents.chat import ChatTemplate
from turnwise.agents.scripted import ScriptedAgent
from turnwise.environments.environment import Environment, Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Step, Transcript
from turnwise.protocols.long_short import LongShort
from turnwise.rl.cold_start.asking import Asking, CheckGrader
from turnwise.rl.cold_start.completion import check_contents, completion_request, dialogue_of
from turnwise.rl.cold_start.thoughts import Chain, Thought, WeighedChain, has_tags, without_tags
from turnwise.rl.demonstrations import demonstrate
from turnwise.rl.rollout import play
from turnwise.rl.sft_sets import long_short_rows
from turnwise.rl.tiny_models import build_tokenizer

THOUGHTS = [
    ("<think>\nOkay, so 7×3.\n\n", "problem understanding"), ("Now 7×3=21.\n\n", "calculation"),
    ("Wait, let me\n\ncheck: 3×7=21.\n\n</think>\n\n", "verification"), ("It is \\boxed{21}.", "final answer"),
]  # fmt: skip


def weighed(*long: bool, thoughts: list[tuple[str, str]] = THOUGHTS, answer: str = "21") -> WeighedChain:
    """A chain of which the thoughts in `long` stay long; what they are worth plays no part here."""
    problem = Problem("p", "What is 7×3?", answer, solution="".join(text for text, _ in thoughts))
    count = len(thoughts)
    chain = Chain(problem, tuple(Thought(text, kind, 5) for text, kind in thoughts))
    ones = (1,) * (count + 1)
    return WeighedChain(chain, ones, ones, ones, (0.5,) * count, (0.0,) * count, (0.0,) * count, long)


def test_a_request_shows_long_thoughts_and_the_kinds_of_short_ones() -> None:
    request = completion_request(weighed(True, False, True, False))
    assert (request.id, request.answer) == ("p", "2 4")
    assert "Write thoughts 2, 4: each as brief" in request.statement
    assert request.statement.endswith(
        'Reply with JSON alone, one entry for each thought to be written, such as {"2": "its content"}.\n\n'
        "Problem:\nWhat is 7×3?\n\n"
        "Outline:\n1. [problem understanding] Okay, so 7×3.\n2. [calculation] (to be written)\n"
        "3. [verification] Wait, let me\n\ncheck: 3×7=21.\n4. [final answer] (to be written)"
    )


words = st.integers(0, 999).map(lambda number: f"word {number:03}")


@given(texts=st.lists(words, min_size=2, max_size=8, unique=True), data=st.data())
def test_no_word_of_a_short_thought_is_told(texts: list[str], data: st.DataObject) -> None:
    long = [True, *data.draw(st.lists(st.booleans(), min_size=len(texts) - 1, max_size=len(texts) - 1))]
    request = completion_request(weighed(*long, thoughts=[(f"{text}.\n\n", "planning") for text in texts]))
    assert [text in request.statement for text in texts] == long
    assert request.answer.split() == [str(number) for number, stays in enumerate(long, start=1) if not stays]


REQUEST = completion_request(weighed(True, False, True, False))


@pytest.mark.parametrize(
    "text",
    [
        '{"2": "×3→21", "4": "so \\\\boxed{21}"}',
        '{"4": " so \\\\boxed{21}\\n", "2": "×3→21"}',
        '```json\n{"2": "×3→21", "4": "so \\\\boxed{21}",}\n```',
        "The thoughts are: {2: '×3→21', 4: 'so \\boxed{21}'} as you asked.",
    ],
)
def test_contents_however_they_are_written(text: str) -> None:
    assert check_contents(REQUEST, text) == {2: "×3→21", 4: r"so \boxed{21}"}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{}", "no content for thought(s) [2, 4]; write each of [2, 4]"),
        ('{"2": "a"}', "no content for thought(s) [4]; write each of [2, 4]"),
        ('{"1": "a", "2": "b"}', "no content for thought(s) [4]; write each of [2, 4]"),
        ('{"1": "a", "2": "b", "4": "c"}', "thought(s) [1] were not asked for; write [2, 4] and no others"),
        ('{"2": "a", "4": "b", "5": "c"}', "thought(s) [5] were not asked for; write [2, 4] and no others"),
        ('{"2": "a", "4": " \\n "}', "4: String should have at least 1 character; got ' \\n '"),
        ('{"2": "a", "4": 21}', "4: Input should be a valid string; got '21'"),
        ('{"2": "a", "4": {"content": "b"}}', "4: Input should be a valid string; got \"{'content': 'b'}\""),
        ('["a", "b"]', "the whole: Input should be an object; got \"['a', 'b']\""),
        ("I would write a and b.", "JSON was expected; got 'I would write a and b.'"),
        *(
            (json.dumps({"2": "a", "4": f"b {tag}"}), "thought 4 holds a tag such as <think>; leave tags out")
            for tag in ("<think>", "</think>", "<answer>", "</answer>", "</rethink>")
        ),
    ],
)
def test_contents_that_cannot_be_used(text: str, fault: str) -> None:
    with pytest.raises(InputError) as raised:
        check_contents(REQUEST, text)
    assert str(raised.value) == fault


def test_contents_are_asked_for_until_they_are_whole() -> None:
    helper = ScriptedAgent(['{"2": "a"}', '{"2": "a", "4": "</answer>"}', '{"2": "a", "4": "b"}'])
    environment = Environment("completion", [REQUEST], CheckGrader(check_contents))
    (episode,) = play(Asking(check_contents), {"helper": helper}, environment)
    assert len(episode.transcript.steps) == 3
    assert episode.grade == Grade(Outcome.RIGHT, '{"2": "a", "4": "b"}')


LONG_1, LONG_3 = "<think>Okay, so 7×3.</think>", "<think>Wait, let me\n\ncheck: 3×7=21.</think>"


@pytest.mark.parametrize(
    ("long", "contents", "dialogue"),
    [
        (
            (True, False, True, False), {2: "×3→21", 4: r"\boxed{21}"},
            [("long", LONG_1), ("short", "<answer>×3→21</rethink>"), ("long", LONG_3),
             ("short", r"<answer>\boxed{21}</answer>")],
        ),
        (
            (True, False, False, False), {2: "a", 3: "b", 4: r"\fbox{20}"},
            [("long", LONG_1), ("short", "<answer>a\n\nb\n\n\\fbox{20}</answer>")],
        ),
        (
            (True, False, False, False), {2: "a", 3: r"\boxed{}", 4: "b"},
            [("long", LONG_1), ("short", "<answer>a\n\n\\boxed{}\n\nb\n\n\\boxed{21}</answer>")],
        ),
        (
            (True, False, True, True), {2: r"\boxed{3}"},
            [("long", LONG_1), ("short", r"<answer>\boxed{3}</rethink>"),
             ("long", f"{LONG_3[:-8]}\n\nIt is \\boxed{{21}}.</think>"), ("short", r"<answer>\boxed{21}</answer>")],
        ),
        (
            (True, True, True, True), {},
            [("long", f"{LONG_1[:-8]}\n\nNow 7×3=21.\n\n{LONG_3[7:-8]}\n\nIt is \\boxed{{21}}.</think>"),
             ("short", r"<answer>\boxed{21}</answer>")],
        ),
    ],
)  # fmt: skip
def test_dialogues_as_literals(
    long: tuple[bool, ...], contents: dict[int, str], dialogue: list[tuple[str, str]]
) -> None:
    assert dialogue_of(weighed(*long), contents) == dialogue


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(build_tokenizer())


said = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.lists(st.sampled_from(["<", "think>", "/answer>", "a < b", "\\boxed{", "}", "5", "\n\n", "<|end|>"])).map(
        "".join
    ),
).filter(lambda text: without_tags(text) != "" and not has_tags(text))


@settings(max_examples=200)
@given(
    first=said, others=st.lists(st.tuples(said, st.booleans()), min_size=1, max_size=8),
    tag=st.sampled_from(["<think>", "</think>\n\n", "</rethink>", "<thi<think>nk>"]),
)  # fmt: skip
def test_every_dialogue_is_one_that_the_protocol_has_and_pays_for_its_format(
    first: str, others: list[tuple[str, bool]], tag: str, template: ChatTemplate
) -> None:
    long = (True, *(stays for _, stays in others))
    # Tags in a long thought are the model's own; in a short one they are refused.
    thoughts = [(tag + first, "planning"), *((text + tag, "calculation") for text, _ in others)]
    contents = {number: text for number, (text, stays) in enumerate(others, start=2) if not stays}
    chain = weighed(*long, thoughts=thoughts)
    request = completion_request(chain)
    assert check_contents(request, json.dumps(contents)).keys() == contents.keys()
    dialogue = dialogue_of(chain, contents)

    assert [seat for seat, _ in dialogue] == ["long", "short"] * (len(dialogue) // 2)
    assert len(dialogue) == 2 * sum(stays and not before for stays, before in zip(long, (False, *long), strict=False))
    assert re.search(r"\\boxed|\\fbox", dialogue[-1][1])
    lines = iter(dialogue)
    spoken = demonstrate(LongShort(max_turns=len(dialogue) + 1), chain.chain.problem, lambda turn: next(lines)[1])
    assert [(turn.seat, reply.text) for turn, reply in spoken] == dialogue
    assert all(reply.stop in turn.stops and not turn.prefill for turn, reply in spoken)
    steps = tuple(Step(turn.seat, turn.state, reply, turn.prefill) for turn, reply in spoken)
    episode = Episode(Transcript(chain.chain.problem, steps), 0, 0, Grade(Outcome.RIGHT))
    (paid,) = LongShort().rewards([episode])
    assert {seat: reward.terms["format"] for seat, reward in paid.items()} == {"long": 1, "short": 1}
    rows = long_short_rows(chain.chain.problem, dialogue, template)
    assert [(row["seat"], row["output"]) for row in rows] == dialogue
