"""An agent that says what a script says: for analysis without models, and for tests."""

import re
from collections.abc import Callable, Sequence

from turnwise.agents.agent import Agent
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Reply, Turn

_WORD = re.compile(r"\s*\S+")


class ScriptedAgent(Agent):
    """Says the lines of `script`, one a turn of its seat, or whatever a function `script(turn, seed)` returns.

    Which line is next follows from the turn alone: it is as many lines on as the turn shows replies of this seat.
    A text is cut behind the first of the turn's closing tags and at the turn's budget, as an engine's would be; a word
    with the space before it counts as one token. A function may return a `Reply` of its own instead.
    """

    def __init__(self, script: Sequence[str] | Callable[[Turn, int], str | Reply]) -> None:
        self.script = script

    async def reply(self, turn: Turn, seed: int) -> Reply:
        """The scripted reply. Raises InputError where the lines have run out."""
        said = self.script(turn, seed) if callable(self.script) else self._line(turn, self.script)
        return said if isinstance(said, Reply) else cut(said, turn)

    def _line(self, turn: Turn, lines: Sequence[str]) -> str:
        before = sum(m.reply is not None and m.reply.model == f"scripted {turn.seat}" for m in turn.messages)
        if before >= len(lines):
            raise InputError(
                f"the script of seat {turn.seat!r} has {len(lines)} line(s); turn {before + 1} needs another"
            )
        return lines[before]


def cut(text: str, turn: Turn) -> Reply:
    """`text` as a reply to `turn`: ended by the first closing tag in it or by the budget, counted in words."""
    ends = {text.find(tag) + len(tag): tag for tag in turn.stops if tag in text}
    stop = ends[min(ends)] if ends else None
    if ends:
        text = text[: min(ends)]
    words = _WORD.findall(text)
    model = f"scripted {turn.seat}"
    if len(words) > turn.max_tokens:
        return Reply("".join(words[: turn.max_tokens]), turn.max_tokens, "length", model=model)
    return Reply(text, len(words), "stop" if stop else "end", stop, model=model)
