"""A chain of thought, cut into thoughts: blocks of steps, found by a model that is asked, or by rules."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, TypeAdapter

from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.rl.cold_start.asking import parse_json
from turnwise.rl.cold_start.thoughts import Chain, CountTokens, Thought, steps_of, without_tags

MOST_BLOCKS = 20


class Block(BaseModel):
    """Steps `start` to `end` of a chain, counted from 1, both included, and the broad kind of thought that they are."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    start: PositiveInt
    end: PositiveInt
    kind: str = Field(min_length=1, validation_alias=AliasChoices("type", "block type", "block_type", "kind"))


def _listed(read: object) -> object:
    """Models like to give each block a name of its own, as in `{"block 1": {...}, ...}`."""
    return list(read.values()) if isinstance(read, dict) else read


_BLOCKS: TypeAdapter[list[Block]] = TypeAdapter(Annotated[list[Block], BeforeValidator(_listed)])


def chunking_request(problem: Problem) -> Problem:
    """What a model is asked, to cut the chain in `problem.solution` into blocks."""
    steps = steps_of(problem.solution)
    numbered = "\n".join(f"Step {number}: {step.strip()}" for number, step in enumerate(steps, start=1))
    request = (
        "Below are a problem and somebody's reasoning about it, in numbered steps. Group the steps into blocks of "
        "reasoning: successive steps that pursue one purpose, such as understanding the problem, planning, a "
        "derivation, a calculation, a verification, another approach, or the final answer. Keep the types as broad as "
        f"these. The first block begins with step 1, each block begins right after the one before it, and the last one "
        f"ends with step {len(steps)}.\n\n"
        'Reply with JSON alone: a list of objects such as {"start": 1, "end": 4, "type": "problem understanding"}.\n\n'
        f"Problem:\n{problem.statement}\n\nSteps:\n{numbered}"
    )
    return Problem(problem.id, request, answer=str(len(steps)))


def check_blocks(request: Problem, text: str) -> list[Block]:
    """The blocks in a reply to `chunking_request`.

    Raises InputError, which names the steps, unless they cover every step once and in order.
    """
    blocks = parse_json(text, _BLOCKS)
    check_cover(blocks, int(request.answer))
    return blocks


def check_cover(blocks: Sequence[Block], steps: int) -> None:
    """Raises InputError unless the blocks run from the first of so many steps to the last, without gap or overlap."""
    due = 1
    for number, block in enumerate(blocks, start=1):
        if block.end < block.start:
            raise InputError(f"block {number} ends at step {block.end}, before its start at step {block.start}")
        if block.start > due:
            raise InputError(f"{_steps(due, block.start - 1)} missing before block {number}: blocks must be contiguous")
        if block.start < due:
            raise InputError(f"block {number} begins at step {block.start}, but the one before it ends at {due - 1}")
        if block.end > steps:
            raise InputError(f"block {number} ends at step {block.end}, but there are only {steps} steps")
        due = block.end + 1
    if due <= steps:
        raise InputError(f"{_steps(due, steps)} missing: the last block must end at the last step, {steps}")


def _steps(first: int, last: int) -> str:
    return f"step {first} is" if first == last else f"steps {first}-{last} are"


# By the first words of a step, in this order. What fits none goes on with what was being done.
_OPENINGS = (
    ("verification", r"wait|(?:now,? )?(?:let me |let's |to )?(?:just )?(?:double[- ]?)?(?:check|verify|confirm)"),
    ("another approach", r"alternatively|another (?:way|approach|method)|instead|maybe|on second thought"),
    ("final answer", r"final answer|boxed|the (?:final )?answer is|i think that's"),
    ("conclusion", r"therefore|thus|hence|so,? (?:the|all|overall|in)\b|in (?:summary|conclusion)|overall"),
    ("problem understanding", r"(?:now,? )?the (?:problem|question)|given|i need"),
    ("planning", r"first|let me (?:try|recall|think|start|see)|to (?:solve|find)|(?:i|we) (?:can|could|will|should)"),
    ("calculation", r"now|next|then|let me|let's|finally|moving on|okay|alright"),
)
_FILLERS = r"\W*(?:(?:okay|alright|hmm|well|so|and|but)\W+)*"
_KINDS = [(kind, re.compile(rf"{_FILLERS}(?:{opening})", re.IGNORECASE)) for kind, opening in _OPENINGS]


def chunk_by_rules(steps: Sequence[str]) -> list[Block]:
    """Blocks by the words that steps begin with ("Wait", "Now", "Alternatively"), without any model.

    A block ends where the next step opens with such a word, once it holds its share: a twentieth of the chain's words,
    so that a chain has about twenty blocks at the most. Where no step does, each may end a block. The first block is
    taken to restate the problem.
    """
    words = [len(step.split()) for step in steps]
    share = sum(words) / MOST_BLOCKS
    said = [next((kind for kind, opening in _KINDS if opening.match(without_tags(step))), "") for step in steps]
    opening = said if any(said[1:]) else ["reasoning"] * len(steps)
    starts, kinds, held = list[int](), list[str](), 0
    for number, kind in enumerate(opening, start=1):
        if not starts or (kind and held >= (share or 1)):
            kinds.append(kind if starts else "problem understanding")
            starts.append(number)
            held = 0
        held += words[number - 1]
    bounds = pairwise([*starts, len(steps) + 1])
    return [
        Block.model_validate({"start": start, "end": after - 1, "kind": kind})
        for (start, after), kind in zip(bounds, kinds, strict=True)
    ]


def chain_of(problem: Problem, blocks: Sequence[Block], count_tokens: CountTokens) -> Chain:
    """The chain of a problem as thoughts. Tokens are counted step by step, as `Continuation` reads them.

    Raises InputError where there are fewer than two thoughts, and for one of no tokens.
    """
    steps = steps_of(problem.solution)
    check_cover(blocks, len(steps))
    tokens = [count_tokens(step) for step in steps]
    thoughts = tuple(
        Thought("".join(steps[block.start - 1 : block.end]), block.kind, sum(tokens[block.start - 1 : block.end]))
        for block in blocks
    )
    if len(thoughts) < 2:
        what = "it has no blank line" if len(steps) < 2 else "all of it is one block"
        raise InputError(f"a chain must have at least two thoughts, or there is nothing to weigh; {what}")
    for number, thought in enumerate(thoughts, start=1):
        if thought.tokens < 1:
            raise InputError(f"thought {number} is empty: it has no tokens; remove it from the chain")
    return Chain(problem, thoughts)
