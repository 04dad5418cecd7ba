"""What the tiny models are taught is right, and is what the protocols will show them."""

import random
import re
from itertools import islice

import pytest

from turnwise.agents.chat import ChatTemplate
from turnwise.environments.arithmetic import Chain, generate, parse_chain
from turnwise.rl.arithmetic_lessons import (
    ALONE_LONG,
    LESSONS,
    ROUTED,
    TOGETHER,
    converse,
    lessons,
    marks,
    say_alone,
    say_together,
    terse_thoughts,
    think_through,
    thoughts,
)  # fmt: skip
from turnwise.rl.demonstrations import tokenised
from turnwise.rl.tiny_models import build_tokenizer

CHAIN = Chain(7, (("×", 3), ("+", 8), ("-", 4)))
# A step in long thoughts, in terse ones, or in a short turn. A check of a step is none.
STEP = re.compile(r", so (?:the digit is )?\d\.\n|→")


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(build_tokenizer())


class Never(random.Random):
    """Never checks a step."""

    def random(self) -> float:
        return 0.99


class Always(random.Random):
    """Checks every step."""

    def random(self) -> float:
        return 0.0


def test_thoughts_as_literals() -> None:
    assert thoughts(CHAIN, 1, 3, Never()) == ("Now 1+8=9, so the digit is 9.\n\nNow 9-4=5, so the digit is 5.\n\n")
    assert thoughts(CHAIN, 0, 1, Always()) == (
        "Now 7×3=21, so the digit is 1.\n\nWait, let me check: 3×7=21, so 1 again.\n\n"
    )
    assert thoughts(Chain(3, (("-", 8),)), 0, 1, Always()) == (
        "Now 3-8=-5, so the digit is 5.\n\nWait, let me check: 5+8=13, which ends in 3, good.\n\n"
    )
    assert think_through(Chain(7, (("×", 3),)), Never()) == (
        "Okay, I need to take 7, then ×3, modulo 10.\n\nNow 7×3=21, so the digit is 1.\n\n"
        "So the digits are 7, 1.\n\n</think>The answer is \\boxed{1}."
    )


def test_few_words_as_literals() -> None:
    assert terse_thoughts(CHAIN, 0, 3) == "7×3=21, so 1.\n\n1+8=9, so 9.\n\n9-4=5, so 5.\n\n"
    assert terse_thoughts(CHAIN, 1, 2) == "1+8=9, so 9.\n\n"
    assert marks(CHAIN, 0, 3) == " ×3→1 +8→9 -4→5"
    assert marks(CHAIN, 2, 3) == " -4→5"
    assert terse_thoughts(CHAIN, 1, 1) == marks(CHAIN, 1, 1) == ""


def test_a_thought_is_terse_now_and_then_and_with_a_partner_alone() -> None:
    rng, spoken = random.Random(0), list[str]()
    for problem in islice(generate("train", levels=(4, 5, 6)), 300):
        said = converse(TOGETHER, problem, say_together, rng)
        spoken += [reply.text for turn, reply in said if turn.seat == "long"]
        assert "Now " in converse(ALONE_LONG, problem, say_alone, rng)[0][1].text
    assert 0.15 < sum("Now " not in text for text in spoken) / len(spoken) < 0.25


def test_a_short_answer_shows_the_first_steps_or_none() -> None:
    rng, shown = random.Random(0), set[int]()
    for problem in islice(generate("train", levels=(4,)), 200):
        turn, reply = converse(ROUTED, problem, say_alone, rng)[-1]
        if turn.state == "short":
            chain, steps = parse_chain(problem), reply.text.count("→")
            assert reply.text == f"{marks(chain, 0, steps)} \\boxed{{{problem.answer}}}"
            shown.add(steps)
    assert shown == {0, 1, 2}


def test_every_conversation_ends_in_the_right_answer_and_takes_every_step_once() -> None:
    rng = random.Random(0)
    for problem in islice(generate("train"), 300):
        said = converse(TOGETHER, problem, say_together, rng)
        text = "".join(turn.prefill + reply.text for turn, reply in said)
        assert text.endswith(f"\\boxed{{{problem.answer}}}</answer>")
        taken = len(STEP.findall(text))
        assert taken == problem.level
        assert all(reply.stop in turn.stops for turn, reply in said)
        assert "".join(reply.text for _, reply in converse(ALONE_LONG, problem, say_alone, rng)).endswith(
            f"</think>The answer is \\boxed{{{problem.answer}}}."
        )


def test_both_modes_are_taught_equally_often() -> None:
    rng = random.Random(0)
    first = [converse(ROUTED, problem, say_alone, rng)[0][1].text for problem in islice(generate("train"), 600)]
    assert set(first) == {"<short>", "<think>"}
    assert 260 < first.count("<think>") < 340


def test_only_what_a_seat_says_is_trained(template: ChatTemplate) -> None:
    rng = random.Random(3)
    for problem in islice(generate("train", levels=(5, 6)), 40):
        said = converse(TOGETHER, problem, say_together, rng)
        for seat in ("long", "short"):
            (sequence,) = tokenised(said, template, (seat,))
            trained = [token for token, mine in zip(sequence.token_ids, sequence.mask, strict=True) if mine]
            text = "".join(reply.text for turn, reply in said if turn.seat == seat)
            assert template.tokenizer.decode(trained) == text
        (whole,) = tokenised(said, template, ("long", "short"))
        assert template.tokenizer.decode(whole.token_ids).startswith(
            f"<|system|><|user|>{problem.question}<|assistant|>"
        )


def test_a_turn_that_no_tag_ends_is_taught_its_end(template: ChatTemplate) -> None:
    (problem,) = islice(generate("train"), 1)
    (sequence,) = tokenised(converse(ALONE_LONG, problem, say_alone, Never()), template, ("long",))
    assert sequence.token_ids[-1] == template.tokenizer.eos_token_id
    assert sequence.mask[-1]
    (sequence,) = tokenised(converse(TOGETHER, problem, say_together, Never()), template, ("short",))
    assert template.tokenizer.decode(sequence.token_ids[-1]) == "</answer>"


@pytest.mark.parametrize("role", LESSONS)
def test_the_stream_of_a_role_is_the_same_each_time_and_never_of_the_test_split(
    role: str, template: ChatTemplate
) -> None:
    first, second = (list(islice(lessons(role, template, 5), 60)) for _ in range(2))
    assert first == second
    assert first != list(islice(lessons(role, template, 6), 60))
    assert all(sequence.trained > 0 for sequence in first)
    held_out = {problem.question for problem in islice(generate("test"), 3000)}
    for sequence in first:
        text = template.tokenizer.decode(sequence.token_ids)
        question = text.partition("<|user|>")[2].partition("<|assistant|>")[0]
        assert question
        assert question not in held_out


def test_weights_of_a_role_add_up() -> None:
    for taught in LESSONS.values():
        assert sum(lesson.weight for lesson in taught) == pytest.approx(1)
