import pickle
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Message, Reply, Step, Transcript, Turn
from turnwise.protocols.debate import Debate
from turnwise.protocols.graph import END, GraphProtocol, State, TurnGraph
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.rewards import Correctness, RewardSum
from turnwise.protocols.solo import Solo

Converse = Callable[..., Transcript]
PLAIN = RewardSum((Correctness(),))
QUESTION = Message("user", "1 + 1?")

ASK = State(seat="a", closes={"</go>": "answer", "</stop>": END}, then="answer", max_tokens=5)
ANSWER = State(seat="b", closes={"</again>": "ask", "</done>": END}, max_tokens=4)
LAST = State(seat="b", closes={"</done>": END}, max_tokens=3, prefill="Finally:")
LOOP = {
    "seats": {"a": "You ask.", "b": ""},
    "start": "ask",
    "states": {"ask": ASK, "answer": ANSWER, "last": LAST},
    "max_turns": 4,
    "final": "last",
}
VOTES = {
    "seats": {"x": "", "y": "", "z": "", "w": ""},
    "start": "vote",
    "states": {
        "vote": State(seat=("x", "y", "z"), then="count", max_tokens=2),
        "count": State(seat="w", closes={"</again>": "vote"}, max_tokens=3),
    },
    "max_turns": 4,
}


def protocol(**changes: object) -> GraphProtocol:
    return GraphProtocol(TurnGraph.model_validate({**LOOP, **changes}), PLAIN)


def votes(**changes: object) -> GraphProtocol:
    return GraphProtocol(TurnGraph.model_validate({**VOTES, **changes}), PLAIN)


def alone(**changes: object) -> GraphProtocol:
    """Seat "a" twice and then "b", whose state has these changes."""
    states = {
        "one": State(seat="a", closes={"</one>": "two", "</end>": END}, then="two"),
        "two": State(seat="a", then="three"),
        "three": State(seat="b").model_copy(update=changes),
    }
    return GraphProtocol(TurnGraph(seats={"a": "", "b": ""}, start="one", states=states), PLAIN)


def where(turns: list[Turn]) -> list[tuple[str, str]]:
    return [(turn.seat, turn.state) for turn in turns]


class TestTransitions:
    def test_the_start_speaks_first(self) -> None:
        turns = protocol().next_turns(Transcript(Problem("p", "1 + 1?", "2")))
        assert turns == [Turn("a", "ask", (Message("system", "You ask."), QUESTION), ("</go>", "</stop>"), 5)]

    @pytest.mark.parametrize(
        ("said", "follows"),
        [
            ("hm </go>", [("b", "answer")]),
            ("hm </stop>", []),
            ("hm", [("b", "answer")]),
            ("one two three four five six </stop>", [("b", "answer")]),
        ],
    )
    def test_the_closing_tag_leads_on_and_then_leads_where_none_came(
        self, converse: Converse, said: str, follows: list[tuple[str, str]]
    ) -> None:
        loop = protocol()
        assert where(loop.next_turns(converse(loop, said))) == follows

    def test_then_may_lead_elsewhere_than_any_tag(self, converse: Converse) -> None:
        loop = protocol()
        assert loop.next_turns(converse(loop, "</go>", "neither tag")) == []
        assert where(loop.next_turns(converse(loop, "</go>", "</again>"))) == [("a", "ask")]

    def test_it_is_the_stop_that_counts_and_not_the_text(self) -> None:
        reply = Reply("I could say </stop> now", 5, "end")
        said = Transcript(Problem("p", "1 + 1?", "2"), (Step("a", "ask", reply),))
        assert where(protocol().next_turns(said)) == [("b", "answer")]

    def test_the_last_turn_before_the_cap_is_the_final_state(self, converse: Converse) -> None:
        loop = protocol()
        three = converse(loop, "</go>", "</again>", "</go>")
        (turn,) = loop.next_turns(three)
        assert (turn.seat, turn.state, turn.prefill, turn.stops, turn.max_tokens) == (
            "b",
            "last",
            "Finally:",
            ("</done>",),
            3,
        )
        assert turn.messages == (QUESTION, *(Message("assistant", s.reply.text, s.reply) for s in three.steps))
        for text in ("2 </done>", "2", "</again>"):
            assert loop.next_turns(converse(loop, "</go>", "</again>", "</go>", text)) == []

    def test_the_final_state_is_not_taken_where_the_dialogue_has_ended_before(self, converse: Converse) -> None:
        loop = protocol()
        assert loop.next_turns(converse(loop, "</go>", "</again>", "</stop>")) == []

    def test_without_a_final_state_the_cap_ends_the_dialogue(self, converse: Converse) -> None:
        loop = protocol(states={"ask": ASK, "answer": ANSWER}, final=None, max_turns=3)
        assert where(loop.next_turns(converse(loop, "</go>", "</again>"))) == [("a", "ask")]
        assert loop.next_turns(converse(loop, "</go>", "</again>", "</go>")) == []

    def test_a_cap_that_is_never_reached_changes_nothing(self, converse: Converse) -> None:
        loop = protocol(max_turns=50)
        said = converse(loop, *["</go>", "</again>"] * 24)
        assert where(loop.next_turns(said)) == [("a", "ask")]

    def test_a_cap_of_one_turn_is_the_final_state_at_once(self, converse: Converse) -> None:
        assert where(protocol(max_turns=1).next_turns(converse(protocol()))) == [("b", "last")]

    def test_a_last_turn_that_ends_the_dialogue_needs_no_final_state(self, converse: Converse) -> None:
        states = {"ask": ASK, "answer": ANSWER.model_copy(update={"closes": {}}), "last": LAST}
        capped = protocol(states=states, max_turns=2)
        assert where(capped.next_turns(converse(capped, "</go>"))) == [("b", "answer")]


class TestSimultaneous:
    def test_all_seats_are_asked_at_once_and_then_follows(self, converse: Converse) -> None:
        graph = votes()
        assert where(graph.next_turns(converse(graph))) == [("x", "vote"), ("y", "vote"), ("z", "vote")]
        assert where(graph.next_turns(converse(graph, ["1", "2", "3"]))) == [("w", "count")]

    def test_their_closing_tags_may_only_lead_where_then_does(self, converse: Converse) -> None:
        vote = State(seat=("a", "b"), closes={"</go>": "last"}, then="last")
        graph = protocol(states={"vote": vote, "last": LAST}, start="vote", max_turns=None, final=None)
        assert [turn.stops for turn in graph.next_turns(converse(graph))] == [("</go>",), ("</go>",)]
        assert where(graph.next_turns(converse(graph, ["1</go>", "2"]))) == [("b", "last")]

    def test_within_one_visit_the_rest_is_asked_and_reads_nothing_of_it(self, converse: Converse) -> None:
        graph = votes()
        before = converse(graph, ["1", "2", "3"], "</again>")
        whole = graph.next_turns(before)
        assert where(whole) == [("x", "vote"), ("y", "vote"), ("z", "vote")]
        assert {len(turn.messages) for turn in whole} == {5}
        one = converse(graph, ["1", "2", "3"], "</again>", ["4"])
        two = converse(graph, ["1", "2", "3"], "</again>", ["4", "5"])
        assert graph.next_turns(one) == whole[1:]
        assert graph.next_turns(two) == whole[2:]

    def test_a_visit_counts_once_towards_the_cap(self, converse: Converse) -> None:
        graph, round_ = votes(), (["1", "2", "3"], "</again>")
        assert len(graph.next_turns(converse(graph, *round_))) == 3
        three = converse(graph, *round_, ["1", "2", "3"])
        assert where(graph.next_turns(three)) == [("w", "count")]
        assert graph.next_turns(three.extended(Step("w", "count", Reply("</again>", 1, "stop", "</again>")))) == []

    def test_the_next_state_reads_them_in_the_order_of_the_seats(self, converse: Converse) -> None:
        shared, chat = votes(), votes(dialogue="chat")
        (turn,) = shared.next_turns(converse(shared, ["1", "2", "3"]))
        assert [(m.role, m.text) for m in turn.messages[1:]] == [
            ("assistant", "1"),
            ("assistant", "2"),
            ("assistant", "3"),
        ]
        (turn,) = chat.next_turns(converse(chat, ["1", "2", "3"]))
        assert [(m.role, m.text) for m in turn.messages[1:]] == [("user", "x: 1"), ("user", "y: 2"), ("user", "z: 3")]


class TestViews:
    def test_in_a_shared_dialogue_all_continue_one_message(self, converse: Converse) -> None:
        loop = protocol()
        said = converse(loop, "why? </go>", "so. </again>")
        (turn,) = loop.next_turns(said)
        first, second = (step.reply for step in said.steps)
        assert turn.messages == (
            Message("system", "You ask."),
            QUESTION,
            Message("assistant", "why? </go>", first),
            Message("assistant", "so. </again>", second),
        )

    def test_in_a_chat_the_others_are_users_under_their_names(self, converse: Converse) -> None:
        chat = protocol(dialogue="chat")
        said = converse(chat, "why? </go>", "so. </again>")
        (turn,) = chat.next_turns(said)
        assert turn.messages == (
            Message("system", "You ask."),
            QUESTION,
            Message("assistant", "why? </go>", said.steps[0].reply),
            Message("user", "b: so. </again>"),
        )

    @pytest.mark.parametrize(("text", "finish"), [("a b c d e f", "length"), ("done", "end")])
    def test_a_missing_closing_tag_is_added_for_the_reader(self, converse: Converse, text: str, finish: str) -> None:
        loop = protocol()
        said = converse(loop, text)
        (turn,) = loop.next_turns(said)
        reply = said.steps[0].reply
        assert reply.finish == finish
        assert turn.messages[1:] == (Message("assistant", reply.text, reply), Message("assistant", "</go>"))

    def test_none_is_added_where_no_tag_leads_where_then_does(self, converse: Converse) -> None:
        states = {"ask": ASK.model_copy(update={"closes": {"</stop>": END}}), "answer": ANSWER, "last": LAST}
        loop = protocol(states=states)
        (turn,) = loop.next_turns(converse(loop, "cut"))
        assert [message.text for message in turn.messages] == ["1 + 1?", "cut"]

    def test_a_prefill_is_read_before_what_it_began(self, converse: Converse) -> None:
        begun = protocol(states={"ask": ASK.model_copy(update={"prefill": "Well,"}), "answer": ANSWER, "last": LAST})
        said = converse(begun, " why? </go>")
        assert said.steps[0].text == "Well, why? </go>"
        (turn,) = begun.next_turns(said)
        assert [(m.role, m.text) for m in turn.messages[1:]] == [("assistant", "Well,"), ("assistant", " why? </go>")]
        chat = protocol(states=dict(begun.graph.states), dialogue="chat")
        (turn,) = chat.next_turns(converse(chat, " why? </go>"))
        assert [(m.role, m.text) for m in turn.messages[1:]] == [("user", "a: Well, why? </go>")]

    @pytest.mark.parametrize(
        ("reads", "texts"),
        [(None, ["1", "2"]), ((), []), (("two",), ["2"]), (("one",), ["1"]), (("one", "two"), ["1", "2"])],
    )
    def test_a_state_reads_the_states_it_names(
        self, converse: Converse, reads: tuple[str, ...] | None, texts: list[str]
    ) -> None:
        graph = alone(reads=reads)
        (turn,) = graph.next_turns(converse(graph, "1</one>", "2"))
        assert [m.text.removesuffix("</one>") for m in turn.messages[1:]] == texts

    def test_what_is_asked_comes_last_and_is_gone_afterwards(self, converse: Converse) -> None:
        graph = alone(ask="And now?")
        (turn,) = graph.next_turns(converse(graph, "1</one>", "2"))
        assert turn.messages[-1] == Message("user", "And now?")
        asked_first = protocol(states={"ask": ASK.model_copy(update={"ask": "Ask!"}), "answer": ANSWER, "last": LAST})
        assert asked_first.next_turns(converse(asked_first))[0].messages[-1] == Message("user", "Ask!")
        (turn,) = asked_first.next_turns(converse(asked_first, "why? </go>"))
        assert [m.text for m in turn.messages] == ["1 + 1?", "why? </go>"]

    def test_the_choices_of_a_problem_are_part_of_the_question(self) -> None:
        problem = Problem("p", "Which?", "A", choices=("this", "that"))
        (turn,) = protocol().next_turns(Transcript(problem))
        assert turn.messages[-1] == Message("user", "Which?\n(A) this\n(B) that")


class TestAnswer:
    def test_it_is_the_last_turn_with_its_prefill(self, converse: Converse) -> None:
        loop = protocol()
        assert loop.answer(converse(loop, "</go>", "</again>", "</go>", " 2 </done>")) == "Finally: 2 </done>"
        assert loop.answer(converse(loop)) == ""

    @pytest.mark.parametrize(
        ("text", "answer"),
        [("hm </think> 2", " 2"), ("hm </think> no </think> 3", " 3"), ("cut", ""), ("</think>", "")],
    )
    def test_behind_the_last_answer_after(self, converse: Converse, text: str, answer: str) -> None:
        graph = alone(answer_after="</think>")
        assert graph.answer(converse(graph, "1</one>", "2", text)) == answer
        assert graph.answer(converse(graph, "1</end>")) == "1</end>"


class TestAnotherProtocol:
    def test_a_transcript_in_other_states_is_refused(self, converse: Converse) -> None:
        said = converse(LongShort(), "</think>", "</rethink>")
        with pytest.raises(
            InputError, match=r"in state 'ask' where the transcript has 'long' in 'think'.*another protocol"
        ):
            protocol().next_turns(said)
        short = LongShort(max_turns=2)
        with pytest.raises(InputError, match=r"in state 'conclude' where the transcript has 'short' in 'answer'"):
            short.next_turns(said)

    def test_within_a_simultaneous_visit_as_well(self, converse: Converse) -> None:
        said = converse(votes(), ["1"]).extended(Step("y", "elsewhere", Reply("2", 1)))
        with pytest.raises(InputError, match=r"in state 'vote' where the transcript has 'y' in 'elsewhere'"):
            votes().next_turns(said)

    def test_a_transcript_that_goes_on_after_the_end_is_refused(self, converse: Converse) -> None:
        said = converse(protocol(), "</stop>").extended(Step("b", "answer", Reply("2", 1)))
        with pytest.raises(InputError):
            protocol().next_turns(said)

    def test_a_transcript_of_other_seats_is_refused(self, converse: Converse) -> None:
        said = converse(Debate(("first", "second")), ["1"])
        with pytest.raises(InputError):
            Debate(("second", "first")).next_turns(said)


class TestWorstCase:
    @pytest.mark.parametrize(
        ("graph", "turns", "tokens"),
        [
            # ask 5, answer 4, ask 5, last 3
            (protocol().graph, 4, 17),
            (protocol(max_turns=5).graph, 5, 5 + 4 + 5 + 4 + 3),
            (protocol(max_turns=2).graph, 2, 5 + 3),
            (protocol(states={"ask": ASK, "answer": ANSWER}, final=None, max_turns=3).graph, 3, 5 + 4 + 5),
            (protocol(states={"ask": ASK, "answer": ANSWER}, final=None, max_turns=1).graph, 1, 5),
            # 3 seats of 2 tokens, then 3, twice
            (votes().graph, 8, 18),
            (votes(max_turns=3).graph, 7, 15),
            (alone().graph, 3, 3 * 1024),
            (Solo(max_tokens=7).graph, 1, 7),
            (LongShort().graph, 6, 3 * 1024 + 3 * 512),
            (LongShort(max_turns=5, long_tokens=100, short_tokens=10).graph, 5, 2 * 100 + 3 * 10),
            (Debate(rounds=3, max_tokens=10).graph, 7, 70),
        ],
    )
    def test_it_is_the_longest_path(self, graph: TurnGraph, turns: int, tokens: int) -> None:
        assert graph.worst_case() == (turns, tokens)

    def test_the_costly_branch_counts_even_where_it_is_the_shorter(self) -> None:
        states = {
            "fork": State(seat="a", closes={"<dear>": "dear", "<cheap>": "cheap"}, max_tokens=1),
            "dear": State(seat="a", max_tokens=1000),
            "cheap": State(seat="a", then="cheaper", max_tokens=10),
            "cheaper": State(seat="a", max_tokens=10),
        }
        assert TurnGraph(seats={"a": ""}, start="fork", states=states).worst_case() == (3, 1001)

    def test_the_token_limit_is_held_against_it(self) -> None:
        assert protocol(token_limit=17).graph.token_limit == 17
        with pytest.raises(ValidationError, match="at worst 17 tokens are sampled, over token_limit 16; 'ask'"):
            protocol(token_limit=16)


def states(**changes: State | None) -> dict[str, State]:
    all_states = {"ask": ASK, "answer": ANSWER, "last": LAST} | changes
    return {name: state for name, state in all_states.items() if state is not None}


class TestFaults:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"start": "begin"}, "start is 'begin', which is no state; the states are ask, answer, last"),
            ({"final": "lost"}, "final is 'lost', which is no state; the states are ask, answer, last"),
            ({"states": states(end=ANSWER)}, "a state may not be called 'end'"),
            (
                {"states": states(ask=ASK.model_copy(update={"closes": {"</go>": "nowhere"}}))},
                "state 'ask' leads to 'nowhere' on '</go>', which is no state",
            ),
            (
                {"states": states(ask=ASK.model_copy(update={"then": "nowhere"}))},
                "state 'ask' leads to 'nowhere' on 'any other end', which is no state",
            ),
            (
                {"states": states(answer=ANSWER.model_copy(update={"reads": ("ask", "nothing")}))},
                "state 'answer' reads 'nothing', which is no state",
            ),
            ({"states": states(island=State(seat="a"))}, r"state\(s\) \['island'\] cannot be reached from 'ask'"),
            (
                {
                    "states": states(
                        ask=State(seat="a", closes={"</go>": "trap"}, then="answer"), trap=State(seat="a", then="trap")
                    )
                },
                r"state\(s\) \['trap'\] cannot end: no path leads to END",
            ),
            ({"seats": {"a": ""}}, r"state 'answer' is for seat 'b', which is missing from seats \['a'\]"),
            ({"seats": {"a": "", "b": "", "c": ""}}, r"seat\(s\) \['c'\] never speak"),
            (
                {"states": states(answer=State(seat=("a", "a")))},
                r"state 'answer' must name each of its seats once; got \('a', 'a'\)",
            ),
            ({"states": states(answer=State(seat=()))}, r"state 'answer' must name each of its seats once; got \(\)"),
            (
                {"max_turns": None, "final": None, "states": states(last=None)},
                r"states \['a\w+', 'a\w+'\] form a loop, .*set max_turns",
            ),
            ({"max_turns": None}, "final state 'last' is taken at the cap, but max_turns is not set"),
            (
                {"final": "answer", "states": states(last=None)},
                "final state 'answer' must end the dialogue, but leads to",
            ),
            (
                {"states": states(ask=ASK.model_copy(update={"closes": {"go": "answer", "go on": END}}))},
                "state 'ask': closing tag 'go' is contained in 'go on'",
            ),
            (
                {"states": states(ask=ASK.model_copy(update={"closes": {" ": "answer"}}))},
                "state 'ask' has an empty closing tag",
            ),
            (
                {"states": states(ask=ASK.model_copy(update={"closes": {"": "answer"}}))},
                "state 'ask' has an empty closing tag",
            ),
            (
                {"states": states(ask=State(seat=("a", "b"), closes={"</go>": "last"}, then="answer"))},
                "state 'ask' is for several seats, which cannot each choose what follows",
            ),
            ({"states": {}}, "states\n.*at least 1 item"),
            ({"max_turns": 0}, "max_turns\n.*greater than 0"),
            ({"max_turn": 3}, "max_turn\n.*Extra inputs are not permitted"),
            ({"dialogue": "mail"}, "dialogue\n.*'shared' or 'chat'"),
            ({"states": {"ask": {"seat": "a", "max_tokens": 0}}}, r"states\.ask\.max_tokens\n.*greater than 0"),
            ({"states": {"ask": {"seat": "a", "stops": []}}}, r"states\.ask\.stops\n.*Extra inputs are not permitted"),
        ],
    )
    def test_a_graph_that_cannot_be_played_is_refused(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            TurnGraph.model_validate({**LOOP, **changes})

    def test_a_state_that_only_loops_to_itself_needs_a_cap(self) -> None:
        once_more = {"on": State(seat="a", closes={"</on>": "on"})}
        with pytest.raises(ValidationError, match=r"states \['on'\] form a loop"):
            TurnGraph(seats={"a": ""}, start="on", states=once_more)
        assert TurnGraph(seats={"a": ""}, start="on", states=once_more, max_turns=3).worst_case() == (3, 3072)

    def test_a_graph_and_its_states_are_frozen(self) -> None:
        graph = protocol().graph
        with pytest.raises(ValidationError, match="frozen"):
            graph.start = "answer"  # type: ignore[misc]
        with pytest.raises(ValidationError, match="frozen"):
            graph.states["ask"].max_tokens = 1  # type: ignore[misc]


class TestPurity:
    def test_the_same_transcript_gives_the_same_turns(self, converse: Converse) -> None:
        loop = protocol()
        said = converse(loop, "</go>", "</again>", "</go>")
        copy = Transcript(said.problem, tuple(said.steps))
        first = loop.next_turns(said)
        assert loop.next_turns(converse(loop)) != first
        assert loop.next_turns(said) == loop.next_turns(copy) == protocol().next_turns(said) == first

    def test_a_protocol_can_be_pickled(self, converse: Converse) -> None:
        for played, said in ((protocol(), ["</go>", "</again>"]), (votes(), [["1", "2", "3"]])):
            again: GraphProtocol = pickle.loads(pickle.dumps(played))
            transcript = converse(played, *said)
            assert again.graph == played.graph
            assert again.seats == played.seats
            assert again.reward == played.reward
            assert again.next_turns(transcript) == played.next_turns(transcript) != []

    def test_a_graph_can_be_written_down_and_read(self) -> None:
        graph = votes(dialogue="chat").graph
        assert TurnGraph.model_validate_json(graph.model_dump_json()) == graph


def test_control_states_are_those_that_say_so() -> None:
    assert protocol().control_states == votes().control_states == frozenset()
    chosen = {**VOTES["states"], "count": State(seat="w", closes={"</again>": "vote"}, control=True)}
    assert votes(states=chosen).control_states == {"count"}
