"""Asking a model for something that can be checked, and telling it what is wrong until it is right."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from json_repair import repair_json
from pydantic import TypeAdapter, ValidationError

from turnwise.environments.environment import Grade, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Message, Reply, Transcript, Turn
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.protocols.rewards import Correctness, Reward, RewardSum

T = TypeVar("T")

Check = Callable[[Problem, str], object]
"""Reads a reply. Raises InputError, in words that its author can mend it by, where it is not what was asked for."""

_FENCED = re.compile(r"```(?:json)?\s*([\[{].*?)```", re.DOTALL)
_JSON = re.compile(r"[\[{].*", re.DOTALL)
# What JSON may escape; any other backslash is one of LaTeX's, whose \boxed, \frac, \right, \times and \neq begin like
# JSON's \b, \f, \r, \t and \n.
_ESCAPE = re.compile(
    r"""(\\["'/\\]|\\u[0-9a-fA-F]{4}|\\[bfrt](?![A-Za-z])|\\n(?!(?:u|e[gq]?|ot(?:in)?|abla|mid|geq?|leq?|ewline|earrow)\b))|\\"""
)


class Asking(ReasoningProtocol):
    """The problem's statement is a request to the one seat, "helper". A reply that `check` refuses is asked for again.

    The helper then sees its reply and what is wrong with it, `attempts` times at most in all.
    """

    seats = ("helper",)

    def __init__(self, check: Check, *, attempts: int = 5, max_tokens: int = 4096) -> None:
        self.check = check
        self.attempts = attempts
        self.max_tokens = max_tokens

    @property
    def fingerprint(self) -> str:
        """The check's name and the limits."""
        return f"Asking {getattr(self.check, '__name__', self.check)} {self.attempts} {self.max_tokens}"

    def next_turns(self, transcript: Transcript) -> Sequence[Turn]:
        """The request; or, after a reply that was refused, the request, all replies, and what is wrong with each."""
        if len(transcript.steps) >= self.attempts:
            return []
        messages = [Message("user", transcript.problem.statement)]
        for step in transcript.steps:
            fault = self._fault(transcript.problem, step.reply)
            if not fault:
                return []
            retry = f"This cannot be used: {fault}. Please send the whole of it again, as JSON and nothing else."
            messages += [Message("assistant", step.reply.text, step.reply), Message("user", retry)]
        return [Turn("helper", "ask", tuple(messages), (), self.max_tokens)]

    def answer(self, transcript: Transcript) -> str:
        """The last reply; of one that was cut off, only that it was."""
        last = transcript.steps[-1].reply
        return f"(cut off after {self.max_tokens} tokens)" if last.finish == "length" else last.text

    def rewards(self, group: Sequence[Episode], step: int = 0) -> list[Mapping[str, Reward]]:
        """1 for a reply that passed the check, else 0."""
        return RewardSum((Correctness(),))(group, self.seats, step)

    def _fault(self, problem: Problem, reply: Reply) -> str:
        if reply.finish == "length":
            return f"it was cut off after {self.max_tokens} tokens; be briefer"
        return fault_in(self.check, problem, reply.text)


class CheckGrader(Grader):
    """Right is what passes the check. All else is unparsable, and the answer is then what is wrong with it."""

    def __init__(self, check: Check) -> None:
        self.check = check

    async def grade(self, problem: Problem, text: str) -> Grade:
        """The grade of a reply."""
        fault = fault_in(self.check, problem, text)
        return Grade(Outcome.UNPARSABLE, fault) if fault else Grade(Outcome.RIGHT, text)


def fault_in(check: Check, problem: Problem, text: str) -> str:
    """What `check` finds wrong with a reply; empty where it finds nothing."""
    try:
        check(problem, text)
    except InputError as error:
        return str(error)
    return ""


def parse_json(text: str, kind: TypeAdapter[T]) -> T:
    """The JSON in a model's reply, as pydantic reads it.

    Mended first are the usual slips around it (code fences, a sentence before it) and in it (trailing commas, single
    quotes, comments, LaTeX whose backslashes are not escaped). Raises InputError for anything else.
    """
    fenced = _FENCED.findall(text)
    found = _JSON.search(fenced[-1] if fenced else text)
    if not found:
        raise InputError(f"JSON was expected; got {text.strip()[:60]!r}")
    try:
        mended = repair_json(_ESCAPE.sub(lambda escape: escape[1] or r"\\", found[0]))
    except Exception:  # json_repair has several for text that it makes nothing of
        raise InputError(f"JSON was expected; got {found[0][:60]!r}") from None
    try:
        return kind.validate_json(mended)
    except ValidationError as errors:
        first = errors.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(f"{place}: {first['msg']}; got {str(first['input'])[:60]!r}") from None
