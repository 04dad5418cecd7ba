import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.environments.errors import InputError
from turnwise.rl.rounds import Round, parse_rounds

POLICIES = ("long", "short")


def test_the_papers_rounds_as_literals() -> None:
    assert parse_rounds("long long short", 30, POLICIES) == [
        Round(1, ("long",), 30),
        Round(2, ("long",), 60),
        Round(3, ("short",), 90),
    ]


def test_several_may_learn_at_once_and_white_space_is_free() -> None:
    assert parse_rounds("  long+short\n short ", 2, POLICIES) == [
        Round(1, ("long", "short"), 2),
        Round(2, ("short",), 4),
    ]


@given(st.lists(st.sampled_from(["long", "short", "long+short"]), min_size=1), st.integers(1, 50))
def test_rounds_follow_each_other_without_a_gap(names: list[str], steps: int) -> None:
    rounds = parse_rounds(" ".join(names), steps, POLICIES)
    assert ["+".join(one.trains) for one in rounds] == names
    assert [one.number for one in rounds] == list(range(1, len(names) + 1))
    assert [one.end - steps for one in rounds] == [0, *(one.end for one in rounds)][:-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"training needs at least one round, such as 'long\+short'; got ''"),
        (" \n", r"training needs at least one round, such as 'long\+short'; got ' \\n'"),
        (
            "long judge",
            r"rounds name who trains in each, of \['long', 'short'\], joined by \+ where several do; got \['judge'\] "
            r"in 'long judge'",
        ),
        ("long,short", r"got \['long,short'\] in 'long,short'"),
        ("long+ short", r"got \[''\] in 'long\+ short'"),
        ("Long", r"got \['Long'\] in 'Long'"),
        (
            "short long+long",
            r"a round names each policy that trains in it once; got 'long\+long' in 'short long\+long'",
        ),
    ],
)
def test_what_is_no_round(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message + "$") as error:
        parse_rounds(text, 30, POLICIES)
    assert "\n" not in str(error.value)
