import re
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.environments.arithmetic import (
    PROBLEM_SETS,
    TEST_SHARE,
    Chain,
    Split,
    apply,
    arithmetic,
    generate,
    parse_chain,
    split_of,
)
from turnwise.environments.environment import Grade, Grader, Outcome
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem

LEVELS = (1, 2, 3, 4, 5, 6, 9)
VERBS = {
    "add": "+", "adds": "+", "counts": "+", "subtract": "-", "subtracts": "-", "takes": "-",
    "multiply": "×", "multiplies": "×",
}  # fmt: skip
chains = st.builds(
    Chain,
    st.integers(0, 9),
    st.lists(st.tuples(st.sampled_from("+-×"), st.integers(2, 9)), min_size=1, max_size=12).map(tuple),
)


class NoGrader(Grader):
    async def grade(self, problem: Problem, text: str) -> Grade:
        return Grade(Outcome.WRONG)


def problems(split: Split, count: int, *, seed: int = 0, levels: tuple[int, ...] = LEVELS) -> list[Problem]:
    return list(islice(generate(split, levels=levels, seed=seed), count))


def evaluated(expression: str) -> int:
    """By plain Python, without the chain."""
    assert re.fullmatch(r"[0-9()+×-]+", expression)
    return int(eval(expression.replace("×", "*"))) % 10


def worked_out(question: str) -> int:
    """By reading the words of a question as a person would."""
    (start,) = re.findall(r"(?:Start with|shows|thinks of) (\d)", question)
    result = int(start)
    steps = re.findall(r"(?i)\b(adds?|counts|subtracts?|takes|multiply|multiplies)(?: it)?(?: by)? (\d)", question)
    for verb, operand in steps:
        operation = VERBS[verb.lower()]
        result += {"+": int(operand), "-": -int(operand), "×": result * (int(operand) - 1)}[operation]
    return result % 10


class TestChain:
    def test_by_hand(self) -> None:
        chain = Chain(7, (("×", 3), ("+", 8), ("-", 4)))
        assert chain.digits == [1, 9, 5]
        assert chain.expression == "((7×3)+8)-4"
        assert Chain(2, (("-", 9),)).digits == [3]
        assert Chain(2, (("-", 9),)).expression == "2-9"
        assert [apply(2, operation, 9) for operation in "+-×"] == [11, -7, 18]

    @given(chains)
    def test_the_last_digit_is_the_expressions_value(self, chain: Chain) -> None:
        assert chain.digits[-1] == evaluated(chain.expression)
        assert len(chain.digits) == len(chain.steps)
        assert set(chain.digits) <= set(range(10))


class TestProblems:
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_the_answer_is_exact_however_it_is_asked(self, split: Split) -> None:
        wordings = ("Work out ", "Start with ", "A dial ", " has a counter ", " thinks of ", "What is ")
        used = set()
        for problem in problems(split, 3500):
            expression = re.match(r"(What is|Work out) ([^,. ]+)", problem.question)
            value = evaluated(expression[2]) if expression else worked_out(problem.question)
            assert int(problem.answer) == value, problem.question
            used.add(next(wording for wording in wordings if wording in problem.question))
        assert used == set(wordings)

    def test_the_solution_is_the_chain(self) -> None:
        for problem in problems("train", 700):
            chain = parse_chain(problem)
            assert chain.digits[-1] == int(problem.answer)
            assert len(chain.steps) == problem.level
            assert problem.solution == " ".join([str(chain.start), *(f"{op}{digit}" for op, digit in chain.steps)])

    def test_every_operand_is_mentioned_in_order(self) -> None:
        for problem in problems("train", 1400):
            text = problem.question.replace("modulo 10", "").replace("the digits 0 to 9", "")
            chain = parse_chain(problem)
            assert [int(digit) for digit in re.findall(r"\d", text)] == [chain.start, *(b for _, b in chain.steps)]
            assert all(2 <= operand <= 9 for _, operand in chain.steps)

    def test_levels_come_in_turn(self) -> None:
        assert [problem.level for problem in problems("test", 7, levels=(4, 1, 6))] == [4, 1, 6, 4, 1, 6, 4]

    def test_ids_are_unique_and_name_the_level(self) -> None:
        some = problems("train", 3000)
        assert len({problem.id for problem in some}) == 3000
        assert all(problem.id.startswith(f"arithmetic-{problem.level}-") for problem in some)
        assert {problem.subject for problem in some} == {"arithmetic"}

    def test_the_stream_is_the_same_in_every_version(self) -> None:
        first, second, third = problems("test", 3, levels=PROBLEM_SETS["mixed"], seed=3)
        assert first == Problem(
            id="arithmetic-1-be692aa829ca",
            question="Emma thinks of 9, then multiplies it by 2. What is the result modulo 10?",
            answer="8",
            level=1,
            subject="arithmetic",
            solution="9 ×2",
        )
        assert (second.solution, second.answer) == ("2 -7 ×5", "5")
        assert (third.solution, third.answer) == ("3 -4 -8 +5", "6")


class TestSplits:
    def test_they_never_meet_whatever_the_seeds(self) -> None:
        seeds = range(2)
        train = [problem for seed in seeds for problem in problems("train", 1500, seed=seed)]
        test = [problem for seed in seeds for problem in problems("test", 700, seed=seed)]
        assert not {problem.question for problem in train} & {problem.question for problem in test}
        assert not {p.solution for p in train if p.level > 1} & {p.solution for p in test if p.level > 1}
        # Two steps leave few enough chains for both splits to come near to each other.
        two = (
            {p.solution for p in problems("train", 4000, levels=(2,))},
            {p.solution for p in problems("test", 600, levels=(2,))},
        )
        assert not two[0] & two[1]
        assert len(two[0]) > 2500
        assert len(two[1]) > 300

    @given(chains, st.sampled_from(["one wording", "another"]))
    def test_a_problem_belongs_to_one_split_by_itself(self, chain: Chain, question: str) -> None:
        split = split_of(chain, question)
        assert split in ("train", "test")
        assert split_of(Chain(chain.start, tuple(chain.steps)), question) == split
        if len(chain.steps) > 1:
            assert split_of(chain, "a third") == split

    def test_one_step_is_taught_in_full_and_tested_in_other_words(self) -> None:
        taught = {problem.solution for problem in problems("train", 5000, levels=(1,))}
        assert len(taught) == 10 * 3 * 8

    def test_the_test_split_is_about_a_tenth(self) -> None:
        drawn = [Chain(start, (("+", a), ("×", b))) for start in range(10) for a in range(2, 10) for b in range(2, 10)]
        share = sum(split_of(chain, "") == "test" for chain in drawn) / len(drawn)
        assert TEST_SHARE == 0.1
        assert 0.06 < share < 0.14


class TestStreams:
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_without_repeats(self, split: Split) -> None:
        some = problems(split, 2000, levels=(1, 2))
        assert len({problem.question for problem in some}) == 2000

    def test_the_same_seed_gives_the_same_stream(self) -> None:
        assert problems("train", 200, seed=1) == problems("train", 200, seed=1)
        assert problems("train", 100, seed=1) == problems("train", 200, seed=1)[:100]
        assert problems("train", 20, seed=1) != problems("train", 20, seed=2)

    @pytest.mark.parametrize("levels", [(), (0,), (2, -1)])
    def test_bad_levels_are_refused(self, levels: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match=r"a number of steps, at least 1; got \["):
            next(generate("train", levels=levels))

    def test_a_level_that_has_run_out_says_so(self) -> None:
        stream = generate("test", levels=(1,))
        count = 0
        with pytest.raises(InputError, match="arithmetic level 1 has no more new problems for split 'test'"):
            for count, _ in enumerate(stream, start=1):  # noqa: B007
                pass
        assert count > 1000


class TestProblemSets:
    @pytest.mark.parametrize(("name", "levels"), [("easy", [1, 2]), ("mixed", [1, 2, 3, 4, 5, 6]), ("hard", [5, 6])])
    def test_each_has_its_levels(self, name: str, levels: list[int]) -> None:
        grader = NoGrader()
        environment = arithmetic(grader, problem_set=name, count=12)
        assert environment.name == f"arithmetic-{name}"
        assert environment.grader is grader
        assert [problem.level for problem in environment.problems] == levels * (12 // len(levels))

    def test_seed_and_split_choose_the_problems(self) -> None:
        assert arithmetic(NoGrader(), count=6).problems == problems("test", 6, levels=PROBLEM_SETS["mixed"])
        train = arithmetic(NoGrader(), count=6, split="train", seed=4).problems
        assert train == problems("train", 6, levels=PROBLEM_SETS["mixed"], seed=4)

    def test_an_unknown_set_is_refused(self) -> None:
        with pytest.raises(InputError, match="no arithmetic problem set 'huge'; there are easy, mixed, hard"):
            arithmetic(NoGrader(), problem_set="huge", count=3)
