"""The short thoughts of a chain, written anew by a model that is told their types alone, and the dialogue they make."""

from itertools import groupby
from typing import Annotated

from pydantic import StringConstraints, TypeAdapter

from turnwise.environments.answers import last_boxed
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.rl.cold_start.asking import parse_json
from turnwise.rl.cold_start.thoughts import WeighedChain, has_tags, without_tags

_CONTENTS: TypeAdapter[dict[int, str]] = TypeAdapter(
    dict[int, Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]]
)
UNWRITTEN = "(to be written)"


def completion_request(weighed: WeighedChain) -> Problem:
    """What a model is asked, to write the short thoughts of a chain: the long ones whole, of the others the types."""
    problem, outline, asked = weighed.chain.problem, list[str](), list[str]()
    for number, (thought, long) in enumerate(zip(weighed.chain.thoughts, weighed.long, strict=True), start=1):
        outline.append(f"{number}. [{thought.kind}] {without_tags(thought.text) if long else UNWRITTEN}")
        asked += [] if long else [str(number)]
    request = (
        "Below are a problem and the outline of a solution in numbered thoughts. Some thoughts are given in full; of "
        f"the others only the type is known. Write thoughts {', '.join(asked)}: each as brief as can be, in keeping "
        "with its type and with the thoughts around it, so that all of them in order solve the problem. Keep the "
        "numbers. The last thought ends with the final answer in \\boxed{}.\n\n"
        f'Reply with JSON alone, one entry for each thought to be written, such as {{"{asked[0] if asked else 2}": '
        '"its content"}.\n\n'
        f"Problem:\n{problem.statement}\n\nOutline:\n" + "\n".join(outline)
    )
    return Problem(problem.id, request, answer=" ".join(asked))


def check_contents(request: Problem, text: str) -> dict[int, str]:
    """The contents in a reply to `completion_request`, by the numbers of the thoughts.

    Raises InputError for a number that is missing or was not asked for, an empty content, and a tag inside one.
    """
    contents, asked = parse_json(text, _CONTENTS), {int(number) for number in request.answer.split()}
    if missing := sorted(asked - contents.keys()):
        raise InputError(f"no content for thought(s) {missing}; write each of {sorted(asked)}")
    if extra := sorted(contents.keys() - asked):
        raise InputError(f"thought(s) {extra} were not asked for; write {sorted(asked)} and no others")
    for number, content in contents.items():
        if has_tags(content):
            raise InputError(f"thought {number} holds a tag such as <think>; leave tags out")
    return contents


def dialogue_of(weighed: WeighedChain, contents: dict[int, str]) -> list[tuple[str, str]]:
    """What each seat of Long⊗Short says, turn by turn, tags included: neighbouring thoughts of one seat are one turn.

    The short seat has the last word, with the problem's answer in a box where its last turn boxes none.
    """
    thoughts = zip(weighed.chain.thoughts, weighed.long, strict=True)
    spoken = [
        (long, without_tags(thought.text) if long else contents[number])
        for number, (thought, long) in enumerate(thoughts, start=1)
    ]
    turns = [(long, [text for _, text in said]) for long, said in groupby(spoken, key=lambda one: one[0])]
    if turns[-1][0]:
        turns.append((False, []))
    last = turns[-1][1]
    if not last_boxed("\n\n".join(last)):
        last.append(f"\\boxed{{{weighed.chain.problem.answer}}}")
    dialogue = []
    for place, (long, texts) in enumerate(turns, start=1):
        said = "\n\n".join(texts)
        closing = "</answer>" if place == len(turns) else "</rethink>"
        dialogue.append(("long", f"<think>{said}</think>") if long else ("short", f"<answer>{said}{closing}"))
    return dialogue
