import pickle
from math import e

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.protocols.lengths import (
    AroraZanetteLength,
    CosineLength,
    DapoLength,
    DrpoLength,
    KimiLength,
    L1ExactLength,
    L1MaxLength,
    LengthTerm,
    O1PrunerLength,
    ShorterBetterLength,
)
from turnwise.protocols.rewards import Correctness, Format, RewardSum, Schedule, Weighted

EVERY = [
    KimiLength(),
    CosineLength(longest=1000),
    L1ExactLength(target=200),
    L1MaxLength(target=200),
    O1PrunerLength(references={"p": 250.0}),
    AroraZanetteLength(),
    DapoLength(longest=800, cushion=400),
    ShorterBetterLength(),
    DrpoLength(longest=1000, temperature=0.1),
]
FORMAT = Format({"long": (("<think>",), ("</think>",)), "short": (("<answer>",), ("</answer>",))})


def episode(length: int, right: bool, text: str = "", short: int = 0) -> Episode:
    steps = (Step("long", "think", Reply(text, length - short)), Step("short", "answer", Reply("4", short)))
    grade = Grade(Outcome.RIGHT if right else Outcome.WRONG)
    return Episode(Transcript(Problem("p", "2 + 2?", "4"), steps), 0, 0, grade)


def group(lengths: list[int], right: list[bool]) -> list[Episode]:
    return [episode(length, answer) for length, answer in zip(lengths, right, strict=True)]


def pay(term: LengthTerm, lengths: list[int], right: list[bool]) -> list[float]:
    return term.pay(group(lengths, right), "long")


class TestKimi:
    def test_papers_fixtures(self) -> None:
        lengths = [100, 200, 300]
        assert pay(KimiLength(), lengths, [True] * 3) == [0.5, 0, -0.5]
        assert pay(KimiLength(), lengths, [False] * 3) == [0, 0, -0.5]
        assert pay(KimiLength(), lengths, [False, True, True]) == [0, 0, -0.5]
        assert pay(KimiLength(), [200] * 3, [True, False, True]) == [0, 0, 0]
        assert pay(KimiLength(), [200], [True]) == [0]

    def test_alone_it_ranks_wrong_and_short_above_right_and_long(self) -> None:
        mixed = group([100, 300], [False, True])
        assert KimiLength().pay(mixed, "long") == [0, -0.5]
        # Beside correctness too, as soon as its weight exceeds 2.
        heavy = (Correctness(), Weighted(KimiLength(), 3.0))
        wrong, right = RewardSum(heavy)(mixed, ("long",))
        assert (wrong["long"].total, right["long"].total) == (0, -0.5)
        wrong, right = RewardSum(heavy, right_beats_wrong=True, margin=0.25)(mixed, ("long",))
        assert (wrong["long"].total, right["long"].total) == (-0.75, -0.5)


def test_cosine() -> None:
    term = CosineLength(longest=1000)
    assert pay(term, [0, 500, 1000, 1200], [True] * 4) == [2, pytest.approx(1.5), -10, -10]
    assert pay(term, [0, 500, 1000], [False] * 3) == [-10, pytest.approx(-5), -10]
    assert pay(term, [250, 750], [True, False]) == [pytest.approx(1.853553), pytest.approx(-1.464466)]


def test_l1() -> None:
    assert pay(L1ExactLength(target=1000), [0, 1000, 2000], [True, False, True]) == [-0.3, 0, -0.3]
    term = L1MaxLength(target=1000, rate=0.001)
    # Worth 1 up to 500 tokens under the budget, 0.5 at it, and nothing from 500 over it.
    assert pay(term, [0, 500, 1000, 1500, 9000], [True] * 5) == [0, 0, -0.5, -1, -1]
    assert pay(term, [0, 9000], [False] * 2) == [0, 0]


def test_o1_pruner() -> None:
    term = O1PrunerLength(references={"p": 300.0})
    assert pay(term, [100, 300, 600, 0], [True, False, True, True]) == [2, 0, -0.5, 299]
    with pytest.raises(ValueError, match="no reference length for problem 'p'"):
        pay(O1PrunerLength(references={"q": 300.0}), [100], [True])


def test_arora_zanette() -> None:
    # Mean 200 and deviation 100 over the right answers alone; the logistic function of 1 is e / (1 + e).
    paid = pay(AroraZanetteLength(), [100, 300, 9000], [True, True, False])
    assert paid == [pytest.approx(-1 / (1 + e)), pytest.approx(-e / (1 + e)), 0]
    assert pay(AroraZanetteLength(), [100, 100, 50], [True, True, False]) == [-0.5, -0.5, 0]
    assert pay(AroraZanetteLength(), [100, 300], [False, False]) == [0, 0]


def test_dapo() -> None:
    term = DapoLength(longest=20480, cushion=4096)
    assert pay(term, [0, 16384, 18432, 20480, 20481], [True, False] * 2 + [True]) == [0, 0, -0.5, -1, -1]


def test_shorter_better() -> None:
    assert pay(ShorterBetterLength(), [100, 200, 400], [False, True, True]) == [-0.1, 0, -0.2]
    assert pay(ShorterBetterLength(), [100, 200, 600], [False] * 3) == [-0.2, -0.1, -0.3]


def test_drpo() -> None:
    # Weights 1 and 1/e of a mean (1 + 1/e) / 2.
    paid = pay(DrpoLength(longest=1000, temperature=0.1), [100, 200, 0], [True, True, False])
    assert paid == [pytest.approx(2 * e / (1 + e) - 1), pytest.approx(2 / (1 + e) - 1), 0]
    assert pay(DrpoLength(longest=1000, temperature=0.1), [100, 200], [False, False]) == [0, 0]


def test_lengths_are_sampled_tokens_of_the_dialogue_or_of_the_seat() -> None:
    spoken = [episode(100, True, "many words that count for nothing", short=90), episode(200, True, short=10)]
    assert KimiLength().pay(spoken, "short") == [0.5, -0.5]
    assert KimiLength(seat_only=True).pay(spoken, "short") == [-0.5, 0.5]
    assert KimiLength(seat_only=True).lengths(spoken, "long") == [10, 190]
    assert KimiLength(seat_only=True).lengths(spoken, "absent") == [0, 0]


@pytest.mark.parametrize("term", EVERY, ids=lambda term: term.name)
class TestEveryTerm:
    @given(lengths=st.lists(st.integers(0, 2000), min_size=1, max_size=8), data=st.data())
    def test_right_beats_wrong_whatever_the_weights(
        self, term: LengthTerm, lengths: list[int], data: st.DataObject
    ) -> None:
        weight = st.floats(-20, 20)
        texts = st.sampled_from(["<think>a</think>", "a", "<think>a", ""])
        played = [episode(length, data.draw(st.booleans()), data.draw(texts)) for length in lengths]
        terms = (
            Weighted(Correctness(), data.draw(weight)),
            Weighted(FORMAT, data.draw(weight)),
            Weighted(term, Schedule(((0, 0.0), (data.draw(st.integers(1, 9)), data.draw(weight))), "linear")),
        )
        margin, step = data.draw(st.floats(1e-3, 10)), data.draw(st.integers(0, 10))
        plain = RewardSum(terms)(played, ("long", "short"), step)
        ordered = RewardSum(terms, right_beats_wrong=True, margin=margin)(played, ("long", "short"), step)
        for seat in ("long", "short"):
            totals = [reward[seat].total for reward in ordered]
            right = [total for total, one in zip(totals, played, strict=True) if one.right]
            wrong = [total for total, one in zip(totals, played, strict=True) if not one.right]
            assert not right or not wrong or min(right) > max(wrong)
            # Right answers keep their totals, and all wrong ones move by one and the same amount.
            moves = [total - reward[seat].total for total, reward in zip(totals, plain, strict=True)]
            assert all(move == 0 for move, one in zip(moves, played, strict=True) if one.right)
            down = [move for move, one in zip(moves, played, strict=True) if not one.right]
            assert down == pytest.approx([min(down)] * len(down)) if down else True
            assert all(move <= 0 for move in down)

    @given(lengths=st.lists(st.integers(1, 2000), min_size=2, max_size=8), right=st.lists(st.booleans(), min_size=8))
    def test_order_does_not_matter(self, term: LengthTerm, lengths: list[int], right: list[bool]) -> None:
        forward = pay(term, lengths, right[: len(lengths)])
        backward = pay(term, lengths[::-1], right[: len(lengths)][::-1])
        assert forward == pytest.approx(backward[::-1])

    @given(
        lengths=st.lists(st.integers(200, 799), min_size=2, max_size=8),
    )
    def test_among_right_answers_shorter_is_never_paid_less(self, term: LengthTerm, lengths: list[int]) -> None:
        # From 200 on: below its target, L1-Exact asks for more.
        paid = pay(term, sorted(lengths), [True] * len(lengths))
        assert paid == sorted(paid, reverse=True)

    def test_it_pickles(self, term: LengthTerm) -> None:
        assert pickle.loads(pickle.dumps(term)) == term


def test_every_length_term_is_tested() -> None:
    # By name: a slotted dataclass leaves its unslotted twin among the subclasses.
    assert {type(term).__name__ for term in EVERY} == {kind.__name__ for kind in LengthTerm.__subclasses__()}


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="target must be a finite number above 0; got 0"):
        L1MaxLength(target=0)
    with pytest.raises(ValueError, match="rate must be"):
        ShorterBetterLength(rate=float("nan"))
    with pytest.raises(ValueError, match=r"cushion must lie in 1\.\.100"):
        DapoLength(longest=100, cushion=200)
    with pytest.raises(ValueError, match="reference length of problem 'p'"):
        O1PrunerLength(references={"p": 0.0})
    with pytest.raises(ValueError, match="finite"):
        CosineLength(longest=10, exceeded=float("inf"))
    with pytest.raises(ValueError, match="temperature"):
        DrpoLength(longest=10, temperature=-1)
