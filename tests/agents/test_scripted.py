import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.agents.scripted import ScriptedAgent, cut
from turnwise.environments.environment import Environment, Grade, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Message, Reply, Turn
from turnwise.protocols.debate import Debate
from turnwise.protocols.long_short import LongShort
from turnwise.rl.rollout import play


class Exact(Grader):
    async def grade(self, problem: Problem, text: str) -> Grade:
        return Grade(Outcome.RIGHT if problem.answer in text else Outcome.WRONG, text)


PROBLEMS = Environment("two", [Problem("p", "1 + 1?", "2"), Problem("q", "1 + 2?", "3")], Exact())


def turn(
    *, stops: tuple[str, ...] = (), max_tokens: int = 100, messages: tuple[Message, ...] = (), seat: str = "a"
) -> Turn:
    return Turn(seat, "state", messages, stops, max_tokens)


def said(episode: Episode) -> list[tuple[str, str]]:
    return [(step.seat, step.reply.text) for step in episode.transcript.steps]


class TestCut:
    @pytest.mark.parametrize(
        ("text", "stops", "max_tokens", "reply"),
        [
            ("It is 2.", (), 100, ("It is 2.", 3, "end", None)),
            ("", (), 100, ("", 0, "end", None)),
            ("It is </a> not </b>", ("</a>", "</b>"), 100, ("It is </a>", 3, "stop", "</a>")),
            ("It is </a> not </b>", ("</b>", "</a>"), 100, ("It is </a>", 3, "stop", "</a>")),
            ("It is </b> not </b>", ("</a>", "</b>"), 100, ("It is </b>", 3, "stop", "</b>")),
            ("one two three four", (), 3, ("one two three", 3, "length", None)),
            ("one two three", (), 3, ("one two three", 3, "end", None)),
            ("one two</a> three", ("</a>",), 2, ("one two</a>", 2, "stop", "</a>")),
            # The budget ends it before the tag.
            ("one two three</a>", ("</a>",), 2, ("one two", 2, "length", None)),
            ("  one\n two", (), 1, ("  one", 1, "length", None)),
            ("<short>It is 2.", ("<short>", "<think>"), 1, ("<short>", 1, "stop", "<short>")),
            ("It is <short>", ("<short>", "<think>"), 1, ("It", 1, "length", None)),
        ],
    )
    def test_at_the_first_closing_tag_and_at_the_budget(
        self, text: str, stops: tuple[str, ...], max_tokens: int, reply: tuple[str, int, str, str | None]
    ) -> None:
        got = cut(text, turn(stops=stops, max_tokens=max_tokens))
        assert (got.text, got.token_count, got.finish, got.stop) == reply
        assert got.model == "scripted a"

    @given(st.text(alphabet="ab \n<>/", max_size=40), st.integers(1, 6))
    def test_a_reply_is_a_beginning_of_the_text_within_the_budget(self, text: str, max_tokens: int) -> None:
        got = cut(text, turn(stops=("<a>", "</b>"), max_tokens=max_tokens))
        assert text.startswith(got.text)
        assert got.token_count == len(got.text.split()) <= max_tokens
        assert (got.finish == "stop") == (got.stop is not None)
        assert got.stop is None or got.text.endswith(got.stop)
        assert got.finish != "end" or got.text == text


class TestLines:
    def test_one_a_turn_in_every_episode(self) -> None:
        team = {
            "long": ScriptedAgent(["<think> one </think>", "<think> two </think>"]),
            "short": ScriptedAgent(["<answer> more </rethink>", "<answer> 2 </answer>"]),
        }
        episodes = play(LongShort(), team, PROBLEMS, samples=2)
        assert [episode.id for episode in episodes] == ["p#0", "p#1", "q#0", "q#1"]
        assert [said(episode) for episode in episodes] == 4 * [
            [
                ("long", "<think> one </think>"),
                ("short", "<answer> more </rethink>"),
                ("long", "<think> two </think>"),
                ("short", "<answer> 2 </answer>"),
            ]
        ]
        assert [episode.right for episode in episodes] == [True, True, False, False]

    def test_in_a_chat_too_and_for_one_agent_in_two_seats(self) -> None:
        agent = ScriptedAgent(["first line", "second line"])
        (episode, _) = play(Debate(("x", "y"), "z"), dict.fromkeys("xyz", agent), PROBLEMS)
        assert said(episode) == [
            ("x", "first line"),
            ("y", "first line"),
            ("x", "second line"),
            ("y", "second line"),
            ("z", "first line"),
        ]

    def test_running_out_of_lines_stops_the_run(self) -> None:
        team = {"long": ScriptedAgent(["</think>"]), "short": ScriptedAgent(["</rethink>"])}
        with pytest.raises(InputError, match=r"the script of seat 'long' has 1 line\(s\); turn 2 needs another"):
            play(LongShort(), team, PROBLEMS)
        with pytest.raises(InputError, match=r"the script of seat 'a' has 0 line\(s\); turn 1 needs another"):
            asyncio.run(ScriptedAgent([]).reply(turn(), 0))

    def test_only_turns_of_its_own_seat_count(self) -> None:
        messages = tuple(Message("assistant", "x", Reply("x", 1, model=f"scripted {seat}")) for seat in "bab")
        assert asyncio.run(ScriptedAgent(["1", "2", "3"]).reply(turn(messages=messages), 0)).text == "2"


class TestFunction:
    def test_it_reads_the_turn_and_the_seed(self) -> None:
        agent = ScriptedAgent(lambda turn, seed: f"{turn.seat} {turn.messages[-1].text} {seed}</a> no")
        asked = turn(messages=(Message("user", "what?"),), stops=("</a>",))
        assert asyncio.run(agent.reply(asked, 7)) == Reply("a what? 7</a>", 3, "stop", "</a>", model="scripted a")

    def test_a_reply_of_its_own_is_not_cut(self) -> None:
        reply = Reply("</a> b c", 17, "end", token_ids=(1, 2, 3))
        agent = ScriptedAgent(lambda turn, seed: reply)
        assert asyncio.run(agent.reply(turn(stops=("</a>",), max_tokens=1), 0)) is reply

    def test_an_exception_is_that_episodes_alone(self) -> None:
        def say(turn: Turn, seed: int) -> str:
            if "1 + 2" in turn.messages[1].text:
                raise KeyError("lost")
            return "</think>"

        team = {"long": ScriptedAgent(say), "short": ScriptedAgent(["2</answer>"])}
        many = Environment(
            "many", [Problem(f"p{n}", "1 + 1?", "2") for n in range(19)] + [PROBLEMS.problems[1]], Exact()
        )
        episodes = play(LongShort(), team, many)
        assert [episode.error for episode in episodes] == [None] * 19 + ["KeyError: 'lost'"]
        assert sum(episode.right for episode in episodes) == 19
