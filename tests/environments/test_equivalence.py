from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.environments.environment import Outcome
from turnwise.environments.equivalence import MAX_LENGTH, compare, decide, number, parses, prepare_worker, tidy

prepare_worker()


def judge(gold: str, answer: str) -> Outcome:
    return decide(gold, answer) or compare(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", "18.00"),
        ("18", "$18"),
        ("18", r"\$18"),
        ("18", r"\(18\)"),
        ("18", "18."),
        ("18", r"\boxed{18}"),
        ("18", r"18\text{ dollars}"),
        ("18", "18 dollars"),
        ("18", r"18 \, \mathrm{cm}^2"),
        (r"15\mbox{ cm}^2", "15"),
        ("1234", "1,234"),
        ("70,000", "70000"),
        ("10000", r"10\,000"),
        ("10000", "10 000"),
        (r"\dfrac{1}{29,\!322,\!216}", r"\frac{1}{29322216}"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", "1/2"),
        (r"\frac34", r"\dfrac{3}{4}"),
        (r"\dfrac 3 8", "0.375"),
        ("1/3", "0.333333"),
        (r"3\frac{1}{2}", "7/2"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("b + c", "c+b"),
        ("5", "x=5"),
        ("x=5", "5"),
        ("10\\%", "10"),
        ("10\\%", "0.1"),
        ("0.1", "10 percent"),
        (r"90^\circ", "90"),
        (r"\text{Evelyn}", "evelyn"),
        (r"\text{June 20}", "June  20"),
        (r"\text{(C)}", "C"),
        ("1,2,3", "3, 1, 2"),
        (r"\{1,2\}", "2,1"),
        ("(1,2)", r"\left( 1, 2 \right)"),
        ("[0,3)", r"\left[0,3\right)"),
        (r"(-\infty,2]\cup[3,\infty)", r"[3,\infty)\cup(-\infty,2]"),
        ("2516_8", "2516_{8}"),
        ("2516_8", "2516"),
        ("6:00", "6:00"),
    ],
)
def test_right(gold: str, answer: str) -> None:
    assert judge(gold, answer) is Outcome.RIGHT


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("3", r"\frac{3}{4}"),  # the released evaluation of Thinkless accepts the first number
        ("3", "3/4"),
        ("3", "3, 4"),
        ("3", "3 or 4"),
        ("3", "33"),
        ("18", "-18"),
        ("18", "18.01"),
        ("5", "5x"),
        ("5", "5 t"),  # math-verify's own removal of units takes this for 5 tonnes
        ("5", r"5\text{ million}"),
        ("5", "5 million"),
        ("5", "5 theta"),
        ("x", "x + 2 m"),
        ("12", r"12 \text{ or } 13"),
        ("5", "$5$ and $6$"),
        ("5", r"\text{the answer is }5"),
        ("x+1", "y+1"),
        ("1/3", "0.33"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("1,2,3", "1,2"),
        (r"\text{Evelyn}", "Carla"),
        (r"8:34 \text{ p.m.}", r"8:34 \text{ a.m.}"),
        ("2516_8", "2516_7"),
        ("2516_8", r"2516_{\text{7}}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ],
)
def test_wrong(gold: str, answer: str) -> None:
    assert judge(gold, answer) is Outcome.WRONG


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "$$",
        "?",
        r"\frac{}{}",
        "((3",
        "3)",
        "((\\frac{3}{4}",
        "foo $3$ )",
        "3 2",  # math-verify adds these up to 5
        "3 1/2",
        "}{",
        "{3",
        "3\0",
        "3\ud800",
        "3" * (MAX_LENGTH + 1),
        "{" * 100_000 + "3" + "}" * 100_000,
    ],
)
@pytest.mark.parametrize("gold", ["3", "5", r"\frac{3}{4}"])
def test_unparsable(gold: str, answer: str) -> None:
    assert judge(gold, answer) is Outcome.UNPARSABLE


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", Fraction(18)),
        ("-0.5", Fraction(-1, 2)),
        ("\u22123", Fraction(-3)),
        (".25", Fraction(1, 4)),
        ("2.", Fraction(2)),
        (r"\$1,234.50", Fraction(2469, 2)),
        ("1,23", None),
        ("1,2,3", None),
        ("12 34", None),
        ("1/2", None),
        ("5%", None),
        ("x", None),
        (".", None),
        ("-", None),
        ("", None),
    ],
)
def test_number(text: str, value: Fraction | None) -> None:
    assert number(text) == value


@given(st.integers(), st.integers())
def test_integers_are_decided_without_algebra(gold: int, answer: int) -> None:
    expected = Outcome.RIGHT if gold == answer else Outcome.WRONG
    assert decide(str(gold), f"{answer:,}") is expected


@given(st.fractions(max_denominator=50), st.fractions(max_denominator=50))
def test_fractions_are_right_where_they_are_equal(gold: Fraction, answer: Fraction) -> None:
    texts = [rf"\frac{{{value.numerator}}}{{{value.denominator}}}" for value in (gold, answer)]
    expected = Outcome.RIGHT if gold == answer else Outcome.WRONG
    assert judge(texts[0], texts[1]) is expected


@pytest.mark.parametrize(
    ("answer", "tidied"),
    [("$ 5 $", "5"), (r"\[5\]", "5"), ("$5$ and $6$", "$5$ and $6$"), ("0.33...", "0.33..."), (r"1,\!234.", "1234")],
)
def test_tidy(answer: str, tidied: str) -> None:
    assert tidy(answer) == tidied


def test_golds_that_cannot_be_graded_against() -> None:
    assert [gold for gold in ["5", r"\frac\pi 2", "x+1", "", "??", "3 2", r"\text{east}", "{"] if not parses(gold)] == [
        r"\frac\pi 2",
        "",
        "??",
        "3 2",
        "{",
    ]
