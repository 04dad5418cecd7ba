"""Short thoughts of arithmetic chains by rule: the tiny models are too small to write them."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise

from turnwise.environments.arithmetic import Chain, parse_chain
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Turn
from turnwise.rl.arithmetic_lessons import terse_thoughts
from turnwise.rl.cold_start.completion import UNWRITTEN


def complete_by_rule(problems: Iterable[Problem]) -> Callable[[Turn, int], str]:
    """A script that writes the short thoughts of arithmetic chains, in place of the papers' large language model.

    It reads what such a model would, the request of `turnwise.rl.cold_start.completion`. The steps that a long thought
    shows are done by it; those up to the next one are shared out over the calculations in between.
    """
    known = {problem.statement: parse_chain(problem) for problem in problems}

    def script(turn: Turn, seed: int) -> str:
        question, _, outline = turn.messages[0].text.partition("Problem:\n")[2].partition("\n\nOutline:\n")
        entries = [(int(number), kind, text) for number, kind, text in _ENTRY.findall(outline)]
        return json.dumps(_contents(known[question], entries), ensure_ascii=False)

    return script


_ENTRY = re.compile(r"^(\d+)\. \[(.*?)\] (.*?)(?=\n\d+\. \[|\Z)", re.DOTALL | re.MULTILINE)
_STEP = re.compile(r"Now (\d)([-+×])(\d)=")


def _contents(chain: Chain, entries: Sequence[tuple[int, str, str]]) -> dict[int, str]:
    befores = [chain.start, *chain.digits]
    steps = [(str(before), sign, str(operand)) for before, (sign, operand) in zip(befores, chain.steps, strict=False)]
    grouped = groupby(entries, key=lambda entry: entry[2] == UNWRITTEN)
    groups = [(unwritten, list(group)) for unwritten, group in grouped]
    shown = [[step for _, _, text in group for step in _STEP.findall(text)] for _, group in groups]
    contents, done = dict[int, str](), 0
    for place, (unwritten, group) in enumerate(groups):
        ahead = next((found for found in shown[place:] if found), [])
        # All of it, since one step may come again later in the chain.
        starts = (start for start in range(done, len(steps)) if ahead and steps[start : start + len(ahead)] == ahead)
        start = next(starts, len(steps))
        if unwritten:
            for number, kind, _ in group:
                contents[number] = f"\\boxed{{{chain.digits[-1]}}}" if kind == "final answer" else "good"
            calculations = [number for number, kind, _ in group if kind == "calculation"] or [group[0][0]]
            cuts = [done + (start - done) * part // len(calculations) for part in range(len(calculations) + 1)]
            for number, (first, last) in zip(calculations, pairwise(cuts), strict=True):
                contents[number] = terse_thoughts(chain, first, last).strip() or contents[number]
            done = start
        elif shown[place]:
            done = start + len(ahead)
    return contents
