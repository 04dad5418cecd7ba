import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.agents.scripted import ScriptedAgent
from turnwise.environments.environment import Environment, Grade, Outcome
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Turn
from turnwise.rl.cold_start.asking import Asking, CheckGrader
from turnwise.rl.cold_start.chunking import (
    Block,
    chain_of,
    check_blocks,
    check_cover,
    chunk_by_rules,
    chunking_request,
)
from turnwise.rl.cold_start.thoughts import count_words, steps_of
from turnwise.rl.rollout import play

DATA = Path(__file__).parents[4] / "shared" / "data"
CHAIN = "<think>\nOkay, what is 7×3?\n\nNow 7×3=21.\n\nWait, let me check: 3×7=21.\n\n</think>\n\nIt is \\boxed{21}."
PROBLEM = Problem("p", "What is 7×3?", "21", solution=CHAIN)
BLOCKS = '[{"start": 1, "end": 2, "type": "calculation"}, {"start": 3, "end": 4, "type": "final answer"}]'


def real(name: str) -> str:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"../shared/data/{name} is not there")
    return path.read_text()


def real_problem() -> Problem:
    example = json.loads(real("longcot_example.jsonl"))
    return Problem("real", example["problem"], str(example["answer"]), solution=example["response"])


def block(start: int, end: int, kind: str = "calculation") -> Block:
    return Block.model_validate({"start": start, "end": end, "kind": kind})


def spans(blocks: Sequence[Block]) -> list[tuple[int, int, str]]:
    return [(block.start, block.end, block.kind) for block in blocks]


def test_a_request_shows_the_problem_and_every_step_by_its_number() -> None:
    request = chunking_request(PROBLEM)
    assert (request.id, request.answer, request.choices) == ("p", "4", ())
    assert request.statement.endswith(
        "ends with step 4.\n\n"
        'Reply with JSON alone: a list of objects such as {"start": 1, "end": 4, "type": "problem understanding"}.\n\n'
        "Problem:\nWhat is 7×3?\n\nSteps:\nStep 1: <think>\nOkay, what is 7×3?\nStep 2: Now 7×3=21.\n"
        "Step 3: Wait, let me check: 3×7=21.\n\n</think>\nStep 4: It is \\boxed{21}."
    )


def test_the_choices_of_a_problem_are_shown() -> None:
    request = chunking_request(Problem("p", "Which?", "B", solution="a\n\nb", choices=("one", "two")))
    assert "Problem:\nWhich?\n(A) one\n(B) two\n\nSteps:\nStep 1: a\nStep 2: b" in request.statement


@pytest.mark.parametrize(
    "text",
    [
        BLOCKS,
        f"```json\n{BLOCKS}\n```",
        f"Here are the blocks:\n{BLOCKS}",
        "[{'start': '1', 'end': '2', 'type': ' calculation '}, {'start': 3, 'end': 4, 'kind': 'final answer'},]",
        '{"block 1": {"start": 1, "end": 2, "block type": "calculation"}, '
        '"block 2": {"start": 3.0, "end": 4, "block_type": "final answer"}}',
    ],
)
def test_blocks_however_they_are_written(text: str) -> None:
    found = check_blocks(chunking_request(PROBLEM), text)
    assert spans(found) == [(1, 2, "calculation"), (3, 4, "final answer")]


@pytest.mark.parametrize(
    ("blocks", "fault"),
    [
        ([], "steps 1-9 are missing: the last block must end at the last step, 9"),
        ([(1, 8)], "step 9 is missing: the last block must end at the last step, 9"),
        ([(2, 9)], "step 1 is missing before block 1: blocks must be contiguous"),
        ([(1, 3), (6, 9)], "steps 4-5 are missing before block 2: blocks must be contiguous"),
        ([(1, 3), (3, 9)], "block 2 begins at step 3, but the one before it ends at 3"),
        ([(1, 3), (1, 9)], "block 2 begins at step 1, but the one before it ends at 3"),
        ([(1, 3), (4, 2)], "block 2 ends at step 2, before its start at step 4"),
        ([(1, 10)], "block 1 ends at step 10, but there are only 9 steps"),
        ([(1, 9), (10, 12)], "block 2 ends at step 12, but there are only 9 steps"),
    ],
)
def test_blocks_that_do_not_cover_the_chain(blocks: list[tuple[int, int]], fault: str) -> None:
    with pytest.raises(InputError) as raised:
        check_cover([block(start, end) for start, end in blocks], 9)
    assert str(raised.value) == fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[]", "steps 1-4 are missing: the last block must end at the last step, 4"),
        ("{}", "steps 1-4 are missing: the last block must end at the last step, 4"),
        ("Steps 1 to 4 are a calculation.", "JSON was expected; got 'Steps 1 to 4 are a calculation.'"),
        ('[{"start": 0, "end": 4, "type": "x"}]', "0.start: Input should be greater than 0; got '0'"),
        ('[{"start": 1, "type": "x"}]', "0.end: Field required; got \"{'start': 1, 'type': 'x'}\""),
        ('[{"start": 1, "end": 4}]', "0.type: Field required; got \"{'start': 1, 'end': 4}\""),
        ('[{"start": 1, "end": 4, "type": " "}]', "0.type: String should have at least 1 character; got ' '"),
        ('[{"start": 1, "end": 4, "type": 5}]', "0.type: Input should be a valid string; got '5'"),
        ('[{"start": 1, "end": 4, "type": "x", "y": 2}]', "0.y: Extra inputs are not permitted; got '2'"),
        ('[{"start": [1], "end": 4, "type": "x"}]', "0.start: Input should be a valid integer; got '[1]'"),
        ("[[1, 4]]", "0: Input should be an object; got '[1, 4]'"),
        ('{"start": 1, "end": 4, "type": "x"}', "0: Input should be an object; got '1'"),
        (BLOCKS[: BLOCKS.index(", {")], "steps 3-4 are missing: the last block must end at the last step, 4"),
    ],
)
def test_replies_that_are_no_blocks(text: str, fault: str) -> None:
    with pytest.raises(InputError) as raised:
        check_blocks(chunking_request(PROBLEM), text)
    assert str(raised.value) == fault


def test_a_number_without_end_is_refused_like_any_other() -> None:
    for digits in (4300, 9000):
        with pytest.raises(InputError, match=r"only 4 steps|Unable to parse"):
            check_blocks(chunking_request(PROBLEM), f'[{{"start": 1, "end": {"9" * digits}, "type": "x"}}]')


def test_a_real_chunking_that_stops_early_is_refused_and_mended() -> None:
    (published,) = json.loads(real("longcot_example_chunks.json"))
    early, request = published["block_prompt_results"], chunking_request(real_problem())
    fault = "steps 134-150 are missing: the last block must end at the last step, 150"
    with pytest.raises(InputError) as raised:
        check_blocks(request, early)
    assert str(raised.value) == fault
    whole = early.replace('"end": 133', '"end": 150')
    prompts = list[str]()

    def script(turn: Turn, seed: int) -> str:
        prompts.append(turn.messages[-1].text)
        return whole if "steps 134-150 are missing" in turn.messages[-1].text else early

    environment = Environment("chunking", [request], CheckGrader(check_blocks))
    (episode,) = play(Asking(check_blocks), {"helper": ScriptedAgent(script)}, environment)
    assert [step.reply.text for step in episode.transcript.steps] == [early, whole]
    assert episode.grade == Grade(Outcome.RIGHT, whole)
    assert prompts == [
        request.statement,
        f"This cannot be used: {fault}. Please send the whole of it again, as JSON and nothing else.",
    ]
    assert spans(check_blocks(request, whole))[0] == (1, 4, "问题理解")


OPENINGS = [
    ("Wait, that's similar to the previous step.", "verification"),
    ("Let me double-check these values.", "verification"),
    ("Now, let's check the second equation.", "verification"),
    ("Hmm, wait. Is that so?", "verification"),
    ("Alright, well, let me verify that.", "verification"),
    ("Alternatively, we could substitute.", "another approach"),
    ("Hmm, maybe another way is shorter.", "another approach"),
    ("**Final Answer**", "final answer"),
    ("\\boxed{33}\n</think>", "final answer"),
    ("\\(\\boxed{33}\\)", "final answer"),
    ("</think>The answer is \\boxed{1}.", "final answer"),
    ("So, the answer is 5.", "final answer"),
    ("Therefore, m = 25.", "conclusion"),
    ("So the digits are 7, 1.", "conclusion"),
    ("So, all three equations are satisfied.", "conclusion"),
    ("Now, the question is to find x.", "problem understanding"),
    ("Given the system of equations:", "problem understanding"),
    ("First, let me write them down.", "planning"),
    ("Okay, so I can divide both sides by y.", "planning"),
    ("Alright, so now I have x, y, z.", "calculation"),
    ("Let me compute 2^(1/3).", "calculation"),
    ("Now 7×3=21, so the digit is 1.", "calculation"),
]  # fmt: skip


@pytest.mark.parametrize(("step", "kind"), OPENINGS)
def test_the_kind_of_a_step_by_its_first_words(step: str, kind: str) -> None:
    assert spans(chunk_by_rules(["one two", step])) == [(1, 1, "problem understanding"), (2, 2, kind)]


def test_a_step_that_opens_with_no_such_word_goes_on_with_what_was_being_done() -> None:
    steps = ["Okay, so x + 1 = 2.", "Let me subtract.", "x = 1.", "Hmm, so x = 1.", "So x = 1.", "Wait, is it?"]
    assert spans(chunk_by_rules(steps)) == [
        (1, 1, "problem understanding"), (2, 5, "calculation"), (6, 6, "verification"),
    ]  # fmt: skip


def test_a_block_holds_its_share_of_words_before_the_next_begins() -> None:
    assert spans(chunk_by_rules(["a " * 10, "Now b", "Wait, c", "Now d", *["e " * 10] * 6])) == [
        (1, 1, "problem understanding"), (2, 3, "calculation"), (4, 10, "calculation"),
    ]  # fmt: skip


def test_a_chain_of_equal_steps_has_twenty_blocks_at_the_most() -> None:
    assert [len(chunk_by_rules(["Now"] * count)) for count in (0, 1, 19, 20, 21, 40)] == [0, 1, 19, 20, 11, 20]


steps = st.lists(
    st.one_of(
        st.text(max_size=30), st.sampled_from([step for step, _ in OPENINGS]), st.sampled_from(["x = 1", "", " "])
    ),
    max_size=80,
)


@given(steps=steps)
def test_rules_cover_every_list_of_steps_with_few_blocks(steps: list[str]) -> None:
    blocks = chunk_by_rules(steps)
    check_cover(blocks, len(steps))
    assert len(blocks) <= 20
    assert {block.kind for block in blocks} <= {"problem understanding", "reasoning", *(kind for _, kind in OPENINGS)}


def test_a_chain_whose_steps_open_with_no_such_word_is_cut_at_its_paragraphs() -> None:
    assert spans(chunk_by_rules(["第一步", "第二步", "第三步"])) == [
        (1, 1, "problem understanding"), (2, 2, "reasoning"), (3, 3, "reasoning"),
    ]  # fmt: skip
    assert [block.end for block in chunk_by_rules([f"Adding {place} and one." for place in range(60)])][:3] == [3, 6, 9]


def test_rules_on_a_real_chain() -> None:
    problem = real_problem()
    assert spans(chunk_by_rules(steps_of(problem.solution))) == [
        (1, 4, "problem understanding"), (5, 8, "planning"), (9, 18, "calculation"), (19, 26, "calculation"),
        (27, 40, "verification"), (41, 49, "verification"), (50, 62, "calculation"), (63, 76, "conclusion"),
        (77, 87, "verification"), (88, 102, "conclusion"), (103, 115, "planning"), (116, 131, "conclusion"),
        (132, 141, "conclusion"), (142, 145, "calculation"), (146, 149, "calculation"), (150, 150, "final answer"),
    ]  # fmt: skip


def test_a_chain_as_thoughts() -> None:
    chain = chain_of(PROBLEM, [block(1, 1, "problem understanding"), block(2, 4)], count_words)
    assert chain.problem is PROBLEM
    assert [(thought.text, thought.kind, thought.tokens) for thought in chain.thoughts] == [
        ("<think>\nOkay, what is 7×3?\n\n", "problem understanding", 5),
        ("Now 7×3=21.\n\nWait, let me check: 3×7=21.\n\n</think>\n\nIt is \\boxed{21}.", "calculation", 11),
    ]
    # Step by step, which is how a base model reads them.
    assert chain_of(PROBLEM, [block(1, 1), block(2, 4)], lambda text: 1).lengths == [1, 3]


@pytest.mark.parametrize(
    ("solution", "blocks", "fault"),
    [
        (
            CHAIN,
            [(1, 4)],
            "a chain must have at least two thoughts, or there is nothing to weigh; all of it is one block",
        ),
        ("a", [(1, 1)], "a chain must have at least two thoughts, or there is nothing to weigh; it has no blank line"),
        ("", [], "a chain must have at least two thoughts, or there is nothing to weigh; it has no blank line"),
        (CHAIN, [(1, 2)], "steps 3-4 are missing: the last block must end at the last step, 4"),
    ],
)
def test_chains_that_make_no_thoughts(solution: str, blocks: list[tuple[int, int]], fault: str) -> None:
    with pytest.raises(InputError) as raised:
        chain_of(Problem("p", "?", "1", solution=solution), [block(*one) for one in blocks], count_words)
    assert str(raised.value) == fault


@given(steps=steps)
def test_the_thoughts_of_a_chain_are_the_chain(steps: list[str]) -> None:
    problem = Problem("p", "?", "1", solution="a\n\nWait, b\n\n" + "\n\n".join(steps))
    found = steps_of(problem.solution)
    chain = chain_of(problem, [block(1, 1), block(2, len(found))], count_words)
    assert "".join(thought.text for thought in chain.thoughts) == problem.solution
    assert sum(chain.lengths) == count_words(problem.solution)
