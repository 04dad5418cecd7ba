import time
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.environments.answers import (
    balanced,
    choice_letter,
    last_boxed,
    last_marked,
    letter_of,
    without_annotations,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{x=\fbox{3}}", "3"),
        (r"\fbox{9}", "9"),
        (r"\boxed { 8 }", "8"),
        (r"\boxed 5", "5"),
        (r"$\boxed 5$ dollars", "5"),
        (r"is \boxed5.", "5"),
        (r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\begin{cases} a \\\boxed{5}\end{cases}", "5"),
        (r"escaped once too often: \\boxed{6}", "6"),
        ("\\boxed{\n11\n}", "11"),
        (r"}}} {{{ \boxed{3}", "3"),
        (r"\boxed{4} and then \boxed{5 was cut", "4"),
        (r"\boxed{a \boxed{b} c", "b"),
        (r"\boxed{}", ""),
        (r"\boxed{5 was cut", None),
        (r"\boxedx{5}", None),
        (r"\boxed", None),
        ("no box {5}", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


FLAT = st.text(st.characters(exclude_characters="\\{}", exclude_categories=["Cs"]))
BALANCED = st.recursive(FLAT, lambda inner: st.tuples(FLAT, inner, FLAT).map(lambda t: f"{t[0]}{{{t[1]}}}{t[2]}"))


@given(before=st.text(), content=BALANCED, after=FLAT)
def test_a_balanced_box_is_found_whatever_stands_before_it(before: str, content: str, after: str) -> None:
    assert last_boxed(f"{before} \\boxed{{{content}}} {after}") == content.strip()


@given(st.text(st.sampled_from(list("\\{}boxedf 1$"))))
def test_last_boxed_takes_any_text(text: str) -> None:
    answer = last_boxed(text)
    assert answer is None or answer in text


@pytest.mark.parametrize(
    ("text", "marker", "answer"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", "####", "18"),
        ("#### 1\n#### 1,234\nbye", "####", "1,234"),
        ("12 left\nA: 26", "A:", "26"),
        ("A: <<20+6=26>>26 ", "A:", "26"),
        ("####\n7", "####", "7"),
        ("#### ", "####", None),
        ("18", "####", None),
        ("", "####", None),
    ],
)
def test_last_marked(text: str, marker: str, answer: str | None) -> None:
    assert last_marked(text, marker) == answer


def test_annotations_are_taken_out() -> None:
    assert without_annotations("16-3=<<16-3=13>>13 and << 1 < 2 >>") == "16-3=13 and << 1 < 2 >>"


@pytest.mark.parametrize(
    ("text", "whether"),
    [("{a{b}}", True), (r"\{", True), (r"\left\{1\right.", True), ("{", False), ("}{", False), (r"\boxed{1", False)],
)
def test_balanced(text: str, whether: bool) -> None:
    assert balanced(text) is whether


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B)", "B"),
        (r"\text{B}", "B"),
        (r"\textbf{(B)}", "B"),
        (r"(\text{C})", "C"),
        (r"\mathrm{D}.", "D"),
        ("B) 12 cm", "B"),
        ("A. benzene", "A"),
        ("**C**", "C"),
        ("$D$", "D"),
        ("E", None),
        ("benzene", None),
        ("Benzene", None),
        ("A cat", None),
        ("12", None),
        ("", None),
    ],
)
def test_letter_of(answer: str, letter: str | None) -> None:
    assert letter_of(answer) == letter


def test_letters_go_as_far_as_the_choices() -> None:
    assert letter_of("E", 5) == "E"
    assert letter_of("C", 2) is None
    assert choice_letter("Answer: E", 5) == "E"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: B", "B"),
        ("The answer is (C).", "C"),
        ("The correct option is **D**, since A is too small.", "D"),
        ("Answer: A. No.\nFinal answer: $B$", "B"),
        (r"Answer: \text{C}", "C"),
        ("The answer is A because of entropy", "A"),
        ("I thought of (A) first.\nSo it is (B).", "B"),
        ("first (A), then (B)", None),
        ("reasons\nB", "B"),
        ("Answer: E", None),
        ("The answer is Always", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_choice_letter(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


PIECES = [
    *[r"\boxed{", "{", "}", "{}", "\\", r"\\", r"\boxed ", " ", r"\boxed", "((", "[(", "<<", "<<1", "####", "#"],
    *["Answer ", "answer is ", "A:", r"\text{", "(A)", "(", "*", "\n", "\0", "\ud800"],
]


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize(
    "function",
    [
        last_boxed,
        last_marked,
        partial(last_marked, marker="A:"),
        without_annotations,
        balanced,
        choice_letter,
        letter_of,
    ],
)
def test_hostile_texts_take_linear_time(function: object, piece: str) -> None:
    assert callable(function)
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    function(text)
    function(f"\\boxed{{{text}")
    assert time.process_time() - start < 20  # quadratic time would be minutes
