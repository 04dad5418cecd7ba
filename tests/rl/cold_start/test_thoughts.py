import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.environments.problem import Problem
from turnwise.rl.cold_start.thoughts import (
    Chain,
    Thought,
    WeighedChain,
    count_words,
    has_tags,
    steps_of,
    without_tags,
)

DATA = Path(__file__).parents[4] / "shared" / "data"

pieces = st.sampled_from(
    ["a", "so b", "\n", "\n\n", "\r\n", "\r", " ", "\t", "\x1c", "\u2028", "<think>", "</think>", "<answer>",
     "</answer>", "</rethink>", "<thi", "nk>", "<", ">", "é", "\\boxed{1}"]
)  # fmt: skip
chains = st.one_of(st.text(), st.lists(pieces, max_size=30).map("".join))


@pytest.mark.parametrize(
    ("chain", "steps"),
    [
        ("", []),
        (" \n\n ", [" \n\n "]),
        ("one\ntwo", ["one\ntwo"]),
        ("one\n\ntwo", ["one\n\n", "two"]),
        ("one\n\n\n \n  two\n\n", ["one\n\n\n \n  ", "two\n\n"]),
        ("one\r\n\r\ntwo\r\nthree", ["one\r\n\r\n", "two\r\nthree"]),
        ("\n\none\n\ntwo", ["\n\none\n\n", "two"]),
        ("<think>\none\n\ntwo", ["<think>\none\n\n", "two"]),
        ("<think>\n\none\n\ntwo", ["<think>\n\none\n\n", "two"]),
        ("one\n\n</think>\n\ntwo", ["one\n\n</think>\n\n", "two"]),
        (
            "one\n\n</think>\n\n <answer> \n\ntwo\n\n</answer>",
            ["one\n\n</think>\n\n <answer> \n\n", "two\n\n</answer>"],
        ),
        ("<think>\n\n</think>\n\n", ["<think>\n\n</think>\n\n"]),
        ("one\n\n</think>two", ["one\n\n", "</think>two"]),
    ],
)
def test_steps_as_literals(chain: str, steps: list[str]) -> None:
    assert steps_of(chain) == steps


@given(chain=chains)
def test_steps_are_the_chain_and_each_of_several_says_something(chain: str) -> None:
    steps = steps_of(chain)
    assert "".join(steps) == chain
    assert all(steps)
    assert len(steps) < 2 or all(without_tags(step) for step in steps)


@given(chain=chains)
def test_the_first_steps_have_the_same_steps(chain: str) -> None:
    steps = steps_of(chain)
    for count in range(len(steps) + 1):
        assert steps_of("".join(steps[:count])) == steps[:count]


def test_a_real_chain_has_the_steps_that_its_authors_found() -> None:
    path = DATA / "longcot_example.jsonl"
    if not path.is_file():
        pytest.skip(f"../shared/data/{path.name} is not there")
    chain = json.loads(path.read_text())["response"]
    steps = steps_of(chain)
    assert len(steps) == 150
    assert (steps[1], steps[134], steps[149]) == (
        "First, let me write down the equations again to make sure I have them right:\n\n",
        "\\boxed{33}\n</think>\n\n",
        "\\(\\boxed{33}\\)",
    )


@given(text=chains)
def test_what_is_left_without_tags_has_none(text: str) -> None:
    left = without_tags(text)
    assert not has_tags(left)
    assert left == left.strip()
    assert has_tags(text) or left == text.strip()


def test_a_tag_in_a_tag_leaves_no_tag() -> None:
    assert without_tags("<think> a < b </think>\n") == "a < b"
    assert without_tags("<thi<think>nk>") == "<thi nk>"
    assert without_tags("7, 1.\n\n</think>The answer") == "7, 1.\n\n The answer"
    assert not has_tags("a <b> < c </b> <thinking>")


def test_what_is_known_of_a_chain() -> None:
    chain = Chain(Problem("p", "1+1?", "2"), (Thought("a b ", "planning", 2), Thought("c", "final answer", 1)))
    weighed = WeighedChain(
        chain, (1, 3, 8), (4, 4, 8), (9.0, 7.5, 1.0), (0.4, -0.25), (0.1, 0.0), (0.2, 0.2), (True, False)
    )
    assert chain.lengths == [2, 1]
    assert weighed.success == [0.25, 0.75, 1]
    assert count_words(" a\n\nb c ") == 3
