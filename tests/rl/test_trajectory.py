import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.rl.trajectory import TokenSequence, join_turns

Turns = list[tuple[tuple[int, ...], tuple[int, ...]]]


def sequence(token_ids: tuple[int, ...], mask: str) -> TokenSequence:
    """The mask as a string: x for a trained token, . for one that was read."""
    return TokenSequence(token_ids, tuple(letter == "x" for letter in mask))


@pytest.mark.parametrize(
    ("turns", "joined"),
    [
        ([], []),
        ([((1, 2), (3, 4))], [sequence((1, 2, 3, 4), "..xx")]),
        ([((), (3, 4))], [sequence((3, 4), "xx")]),
        # The second prompt is all that came before, and what was read since.
        ([((1, 2), (3,)), ((1, 2, 3, 8, 9), (4, 5))], [sequence((1, 2, 3, 8, 9, 4, 5), "..x..xx")]),
        # Nothing was read in between, as after Thinkless' control token.
        ([((1, 2), (3,)), ((1, 2, 3), (4, 5))], [sequence((1, 2, 3, 4, 5), "..xxx")]),
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
        ([((1, 2), ()), ((1, 2, 3), (4,))], [sequence((1, 2, 3, 4), "...x")]),
    ],
)
def test_join_turns(turns: Turns, joined: list[TokenSequence]) -> None:
    assert join_turns(turns) == joined


def test_lists_and_tuples_of_ids_are_the_same() -> None:
    assert join_turns([([1, 2], (3,)), ((1, 2, 3, 4), [5])]) == [sequence((1, 2, 3, 4, 5), "..x.x")]


def test_trained_counts_the_said_tokens() -> None:
    assert sequence((1, 2, 3, 4), ".x.x").trained == 2
    assert sequence((1, 2), "..").trained == 0


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


@given(turn_lists)
def test_turns_that_continue_each_other_are_one_sequence(
    parts: list[tuple[bool, tuple[int, ...], tuple[int, ...]]],
) -> None:
    turns = with_prompts([(True, read, said) for _, read, said in parts])
    joined = join_turns(turns)
    assert len(joined) == min(1, len(turns))
    assert all(s.token_ids == turns[-1][0] + turns[-1][1] for s in joined)
