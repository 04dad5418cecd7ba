"""A helper is asked until its reply can be used, and told each time what is wrong with it."""

import asyncio
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from turnwise.agents.scripted import ScriptedAgent
from turnwise.environments.environment import Environment, Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Turn
from turnwise.rl.cold_start.asking import Asking, CheckGrader, fault_in, parse_json
from turnwise.rl.rollout import play, play_episode

NUMBERS: TypeAdapter[list[int]] = TypeAdapter(list[int])
NAMED: TypeAdapter[dict[int, str]] = TypeAdapter(dict[int, str])
REQUEST = Problem("p", "Send a list of numbers.", "")


def numbers(problem: Problem, text: str) -> list[int]:
    return parse_json(text, NUMBERS)


def asked(*replies: str | Reply, attempts: int = 5, max_tokens: int = 4096) -> tuple[Episode, list[Turn]]:
    """The episode in which a helper replies so (the last again and again), and the turns that it was asked in."""
    turns = list[Turn]()

    def script(turn: Turn, seed: int) -> str | Reply:
        turns.append(turn)
        return replies[min(len(turns), len(replies)) - 1]

    environment = Environment("asking", [REQUEST], CheckGrader(numbers))
    protocol = Asking(numbers, attempts=attempts, max_tokens=max_tokens)
    (episode,) = play(protocol, {"helper": ScriptedAgent(script)}, environment)
    return episode, turns


def test_a_valid_reply_is_not_asked_for_again() -> None:
    episode, turns = asked("[1, 2]")
    assert episode.grade == Grade(Outcome.RIGHT, "[1, 2]")
    (turn,) = turns
    assert (turn.seat, turn.stops, turn.max_tokens, turn.prefill) == ("helper", (), 4096, "")
    assert [(message.role, message.text) for message in turn.messages] == [("user", "Send a list of numbers.")]
    assert Asking(numbers).rewards([episode])[0]["helper"].total == 1


def test_a_helper_reads_all_that_it_said_and_what_is_wrong_with_it() -> None:
    episode, turns = asked("No.", "[1, 'x']", "[1]")
    assert episode.grade == Grade(Outcome.RIGHT, "[1]")
    again = "Please send the whole of it again, as JSON and nothing else."
    first = f"This cannot be used: JSON was expected; got 'No.'. {again}"
    second = (
        "This cannot be used: 1: Input should be a valid integer, unable to parse string as an integer; got 'x'. "
        f"{again}"
    )
    assert [(message.role, message.text) for message in turns[-1].messages] == [
        ("user", "Send a list of numbers."), ("assistant", "No."), ("user", first), ("assistant", "[1, 'x']"),
        ("user", second),
    ]  # fmt: skip
    # Exact token ids, where an engine has them, are in the replies.
    assert [m.reply for m in turns[-1].messages if m.role == "assistant"] == [
        step.reply for step in episode.transcript.steps[:2]
    ]


def test_a_helper_that_never_sends_json_is_asked_so_many_times_and_the_reason_is_kept() -> None:
    for attempts in (1, 3):
        episode, turns = asked("I would rather not.", attempts=attempts)
        assert len(turns) == len(episode.transcript.steps) == attempts
        assert episode.grade == Grade(Outcome.UNPARSABLE, "JSON was expected; got 'I would rather not.'")
        assert episode.error is None
        assert Asking(numbers).rewards([episode])[0]["helper"].total == 0


def test_a_reply_that_was_cut_off_is_never_used_even_where_it_reads_well() -> None:
    episode, turns = asked(Reply("[1, 2", 2, "length"), Reply("[1, 2]", 2, "length"), "[3]", max_tokens=7)
    assert episode.grade == Grade(Outcome.RIGHT, "[3]")
    assert (
        turns[1].messages[2].text
        == turns[2].messages[4].text
        == (
            "This cannot be used: it was cut off after 7 tokens; be briefer. "
            "Please send the whole of it again, as JSON and nothing else."
        )
    )
    episode, turns = asked("[1, " * 4 + "2]" * 4, attempts=2, max_tokens=3)
    assert len(turns) == 2
    assert episode.grade == Grade(Outcome.UNPARSABLE, "JSON was expected; got '(cut off after 3 tokens)'")


def test_an_exception_in_the_helper_is_an_error_of_that_episode_and_no_more() -> None:
    def script(turn: Turn, seed: int) -> str:
        raise ConnectionError("gone")

    play = play_episode(Asking(numbers), {"helper": ScriptedAgent(script)}, CheckGrader(numbers), REQUEST)
    episode = asyncio.run(play)
    assert (episode.error, episode.grade, episode.transcript.steps) == ("ConnectionError: gone", None, ())


def test_what_a_run_of_asking_is_known_by() -> None:
    assert Asking(numbers).fingerprint == "Asking numbers 5 4096"
    assert Asking(numbers, attempts=2, max_tokens=9).fingerprint == "Asking numbers 2 9"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[1, 2]", [1, 2]),
        ("```json\n[1, 2]\n```", [1, 2]),
        ("```\n[1, 2,]\n```\nI hope that this helps.", [1, 2]),
        ("Here you are:\n\n[1, 2]", [1, 2]),
        ("['1', \"2\"]", [1, 2]),
        ("[1, // the first\n 2.0 /* the second */]", [1, 2]),
        ("[1, 2] is what you asked for.", [1, 2]),
        ("[]", []),
    ],
)
def test_usual_slips_are_mended(text: str, found: list[int]) -> None:
    assert parse_json(text, NUMBERS) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r'{"1": "so \boxed{5}"}', r"so \boxed{5}"),
        (r'{"1": "so \\boxed{5}"}', r"so \boxed{5}"),
        (r'{"1": "\frac{1}{2} \times \sqrt{2} \right \rho \theta"}', r"\frac{1}{2} \times \sqrt{2} \right \rho \theta"),
        (r'{"1": "\( x \neq \notin \ne \nabla \underline{y} \)"}', r"\( x \neq \notin \ne \nabla \underline{y} \)"),
        (r'{"1": "a\nnext\n2\t3\n\new"}', "a\nnext\n2\t3\n\new"),
        (r'{"1": "\\\\ \\neq \"q\" \u00e9 \/"}', r"\\ \neq " + '"q" é /'),
        (r"""{"1": "it\'s"}""", "it's"),
        (r"{'1': 'it\'s, \'so\', it is'}", "it's, 'so', it is"),
    ],
)
def test_the_backslashes_of_latex_are_no_escapes(text: str, found: str) -> None:
    assert parse_json(text, NAMED) == {1: found}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "JSON was expected; got ''"),
        ("  I cannot.  ", "JSON was expected; got 'I cannot.'"),
        ("x" * 100, f"JSON was expected; got '{'x' * 60}'"),
        ("[1, null]", "1: Input should be a valid integer; got 'None'"),
        ('{"a": 1}', "the whole: Input should be a valid array; got \"{'a': 1}\""),
        ("[1.5]", "0: Input should be a valid integer, got a number with a fractional part; got '1.5'"),
        ("[" * 3000, f"JSON was expected; got '{'[' * 60}'"),
        ("[{" * 3000, f"JSON was expected; got '{'[{' * 30}'"),
        ("{”```json1[-[```json```NaN :2```json true:null", None),
    ],
)
def test_other_replies_are_refused_and_the_reason_is_said(text: str, fault: str | None) -> None:
    with pytest.raises(InputError) as raised:
        parse_json(text, NUMBERS)
    assert fault is None or str(raised.value) == fault


tokens = st.sampled_from([*"[]{}\"',:\\/1 ", "\n", "\\u", "d8", "```json", "```", "//", "/*", "NaN", "é", "x", "null"])


@given(text=st.one_of(st.text(), st.lists(tokens, max_size=40).map("".join)))
def test_no_reply_stops_the_run(text: str) -> None:
    """A reply is read, or refused by one line that can be sent back and stored."""
    fault = fault_in(numbers, REQUEST, text)
    assert fault == "" or re.fullmatch(r"[^\n]+; got .*", fault, re.DOTALL)
    grade = asyncio.run(CheckGrader(numbers).grade(REQUEST, text))
    assert grade == (Grade(Outcome.UNPARSABLE, fault) if fault else Grade(Outcome.RIGHT, text))


@given(
    read=st.dictionaries(st.integers(0, 99), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\\")))
)
def test_json_is_read_as_it_is(read: dict[int, str]) -> None:
    # Tabs and the like before a letter are taken for LaTeX's, and are therefore left out here.
    text = json.dumps({str(number): re.sub(r"[\b\f\r\t\n]", " ", said) for number, said in read.items()})
    assert parse_json(text, NAMED) == {int(number): said for number, said in json.loads(text).items()}


def test_a_fenced_block_goes_before_brackets_in_the_sentence_around_it() -> None:
    reply = 'Steps [1] to [4] restate it.\n```json\n{"2": "so [5]"}\n```\nThat is all of [1].'
    assert parse_json(reply, TypeAdapter(dict[int, str])) == {2: "so [5]"}


def test_latex_that_begins_like_a_line_break_is_latex() -> None:
    reply = r'{"2": "\nu \neg a \ngeq b\newline c\n\nNow d"}'
    assert parse_json(reply, TypeAdapter(dict[int, str])) == {2: "\\nu \\neg a \\ngeq b\\newline c\n\nNow d"}
