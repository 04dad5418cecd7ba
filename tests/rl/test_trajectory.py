import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.rl.trajectory import SaidTurn, TokenSequence, Trajectory, join_turns, trajectories

Dialogue = Callable[..., Episode]
Turns = list[tuple[tuple[int, ...], tuple[int, ...]]]


def sequence(token_ids: tuple[int, ...], said: str) -> TokenSequence:
    """Turns as a string: each run of the same letter, x or y, is a turn that was said; what was read is a dot."""
    assert len(token_ids) == len(said)
    return TokenSequence(token_ids, tuple(match.span() for match in re.finditer(r"x+|y+", said)))


@pytest.mark.parametrize(
    ("turns", "joined"),
    [
        ([], []),
        ([((1, 2), (3, 4))], [sequence((1, 2, 3, 4), "..xx")]),
        ([((), (3, 4))], [sequence((3, 4), "xx")]),
        # The second prompt is all that came before, and what was read since.
        ([((1, 2), (3,)), ((1, 2, 3, 8, 9), (4, 5))], [sequence((1, 2, 3, 8, 9, 4, 5), "..x..xx")]),
        # Nothing was read in between, as after Thinkless' control token.
        ([((1, 2), (3,)), ((1, 2, 3), (4, 5))], [sequence((1, 2, 3, 4, 5), "..xyy")]),
        # Another history begins anew.
        ([((1, 2), (3,)), ((1, 7), (4,))], [sequence((1, 2, 3), "..x"), sequence((1, 7, 4), "..x")]),
        # What was said before is not in the prompt, so this is no continuation.
        ([((1, 2), (3,)), ((1, 2), (4,))], [sequence((1, 2, 3), "..x"), sequence((1, 2, 4), "..x")]),
        ([((1, 2), (3,)), ((1, 2, 9, 9), (4,))], [sequence((1, 2, 3), "..x"), sequence((1, 2, 9, 9, 4), "....x")]),
        # A third turn continues the latest sequence, not an earlier one.
        (
            [((1,), (2,)), ((5,), (6,)), ((5, 6, 7), (8,)), ((1, 2, 3), (4,))],
            [sequence((1, 2), ".x"), sequence((5, 6, 7, 8), ".x.x"), sequence((1, 2, 3, 4), "...x")],
        ),
        # A turn that said nothing still tells what was read.
        ([((1, 2), ()), ((1, 2, 3), (4,))], [TokenSequence((1, 2, 3, 4), ((2, 2), (3, 4)))]),
    ],
)
def test_join_turns(turns: Turns, joined: list[TokenSequence]) -> None:
    assert join_turns(turns) == joined


def test_lists_and_tuples_of_ids_are_the_same() -> None:
    assert join_turns([([1, 2], (3,)), ((1, 2, 3, 4), [5])]) == [sequence((1, 2, 3, 4, 5), "..x.x")]


@pytest.mark.parametrize(
    ("said", "mask"),
    [
        (((1, 2), (3, 4)), (False, True, False, True)),
        (((0, 1), (1, 3)), (True, True, True, False)),
        (((1, 1), (2, 4)), (False, False, True, True)),
        ((), (False, False, False, False)),
    ],
)
def test_the_said_tokens_are_trained(said: tuple[tuple[int, int], ...], mask: tuple[bool, ...]) -> None:
    assert TokenSequence((5, 6, 7, 8), said).mask == mask
    assert TokenSequence((5, 6, 7, 8), said).trained == sum(mask)


ids = st.lists(st.integers(0, 2), max_size=4).map(tuple)
# Few ids and prompts that often continue what came before.
turn_lists = st.lists(st.tuples(st.booleans(), ids, ids), max_size=8)


def with_prompts(parts: list[tuple[bool, tuple[int, ...], tuple[int, ...]]]) -> Turns:
    turns: Turns = []
    for continues, read, said in parts:
        before = turns[-1][0] + turns[-1][1] if continues and turns else ()
        turns.append((before + read, said))
    return turns


@given(turn_lists)
def test_each_said_token_is_trained_once_after_what_was_read(
    parts: list[tuple[bool, tuple[int, ...], tuple[int, ...]]],
) -> None:
    turns = with_prompts(parts)
    joined = join_turns(turns)
    trained = [token for s in joined for token, mine in zip(s.token_ids, s.mask, strict=True) if mine]
    assert trained == [token for _, said in turns for token in said]
    assert sum(s.trained for s in joined) == len(trained)
    contexts = [
        (s.token_ids[:place], token)
        for s in joined
        for place, (token, mine) in enumerate(zip(s.token_ids, s.mask, strict=True))
        if mine
    ]
    assert contexts == [(prompt + said[:n], said[n]) for prompt, said in turns for n in range(len(said))]
    spoken = [(s.token_ids[:start], s.token_ids[start:end]) for s in joined for start, end in s.said]
    assert spoken == turns


@given(turn_lists)
def test_turns_that_continue_each_other_are_one_sequence(
    parts: list[tuple[bool, tuple[int, ...], tuple[int, ...]]],
) -> None:
    turns = with_prompts([(True, read, said) for _, read, said in parts])
    joined = join_turns(turns)
    assert len(joined) == min(1, len(turns))
    assert all(s.token_ids == turns[-1][0] + turns[-1][1] for s in joined)


# Of an episode


def test_a_seats_turns_in_a_dialogue_as_literals(dialogue: Dialogue) -> None:
    """What the other seat said is read; 30 and 31 stand for the seats' instructions, 1, 2, 3 for the question."""
    episode = dialogue(("long", "think", (7, 8)), ("short", "answer", (9,)), ("long", "think", (10,)))
    steps = episode.transcript.steps
    assert trajectories(episode, "long") == [
        Trajectory(
            episode,
            "long",
            TokenSequence((30, 1, 2, 3, 7, 8, 9, 10), ((4, 6), (7, 8))),
            (SaidTurn(0, 4, 6, steps[0]), SaidTurn(2, 7, 8, steps[2])),
        )
    ]
    assert trajectories(episode, "short") == [
        Trajectory(episode, "short", TokenSequence((31, 1, 2, 3, 7, 8, 9), ((6, 7),)), (SaidTurn(1, 6, 7, steps[1]),))
    ]
    assert trajectories(episode, "judge") == []


def test_a_history_that_is_not_kept_begins_a_sequence(dialogue: Dialogue) -> None:
    turns = [("long", "think", (7, 8)), ("long", "think", (9,)), ("short", "answer", (5,)), ("long", "think", (6,))]
    first, second = trajectories(dialogue(*turns, forgetful=True), "long")
    assert first.sequence == sequence((30, 1, 2, 3, 7, 8, 9), "....xxy")
    assert second.sequence == sequence((30, 1, 2, 3, 5, 6), ".....x")
    assert [[turn.place for turn in found.turns] for found in (first, second)] == [[0, 1], [3]]


@pytest.mark.parametrize(
    ("fields", "gave"),
    [
        ({"token_ids": (), "log_probabilities": ()}, "gave 0 ids and 0 log-probabilities"),
        ({"log_probabilities": ()}, "gave 2 ids and 0 log-probabilities"),
        ({"log_probabilities": (-1.0, -1.0, -1.0)}, "gave 2 ids and 3 log-probabilities"),
        ({"prompt_token_ids": ()}, "gave 2 ids and 2 log-probabilities"),
    ],
)
def test_what_was_not_sampled_token_by_token_cannot_be_trained(
    dialogue: Dialogue, fields: dict[str, tuple[float, ...]], gave: str
) -> None:
    whole = dialogue(("long", "think", (7,)), ("short", "answer", (5,)), ("long", "think", (8, 9)))
    first, other, last = whole.transcript.steps
    broken = last._replace(reply=replace(last.reply, **fields))
    episode = replace(whole, transcript=replace(whole.transcript, steps=(first, other, broken)))
    with pytest.raises(InputError, match=rf"seat 'long' in episode 'p#0' spoke by 'by hand', which {gave}"):
        trajectories(episode, "long")
    assert len(trajectories(episode, "short")) == 1


@given(turn_lists.filter(lambda parts: all(said for _, _, said in parts)), st.lists(st.booleans(), min_size=8))
def test_each_turn_lies_where_its_reply_was_said(
    parts: list[tuple[bool, tuple[int, ...], tuple[int, ...]]], mine: list[bool]
) -> None:
    steps = [
        Step("me" if my else "you", "s", Reply("", len(said), "end", None, said, (-1.0,) * len(said), (9, *prompt)))
        for (prompt, said), my in zip(with_prompts(parts), mine, strict=False)
    ]
    episode = Episode(Transcript(Problem("p", "?", "!"), tuple(steps)), 0, 0)
    turns = [(found, turn) for found in trajectories(episode, "me") for turn in found.turns]
    assert [turn.place for _, turn in turns] == [place for place, step in enumerate(steps) if step.seat == "me"]
    for found, turn in turns:
        assert turn.step is steps[turn.place]
        assert found.sequence.token_ids[turn.start : turn.end] == turn.step.reply.token_ids
        assert found.sequence.token_ids[: turn.start] == turn.step.reply.prompt_token_ids
        assert (turn.start, turn.end) in found.sequence.said
