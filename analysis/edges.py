"""The graph that dialogues went through: how often each edge was taken, counted from the transcripts alone."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from turnwise.environments.episode import Episode
from turnwise.environments.transcript import Step
from turnwise.protocols.graph import END

START, FAILED = "\0start", "\0failed"
"""Where each dialogue comes from, and where one that an exception ended goes, by names that no state has."""


@dataclass(slots=True)
class Edges:
    """What some episodes add up to: how often each (from, to, closing tag) was `taken`.

    The tag is empty for any other end of a turn. `visits`, `tokens` (sampled) and `seats` are those of each state.
    """

    taken: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    visits: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    seats: dict[str, dict[str, None]] = field(default_factory=dict)

    def add(self, episode: Episode) -> None:
        """Counts one episode."""
        before, tag = START, ""
        for visit in _visits(episode.transcript.steps):
            state = visit[0].state
            self.taken[before, state, tag] += 1
            self.visits[state] += 1
            self.tokens[state] += sum(step.reply.token_count for step in visit)
            self.seats.setdefault(state, {}).update(dict.fromkeys(step.seat for step in visit))
            before, tag = state, visit[-1].reply.stop or ""
        self.taken[before, END if episode.error is None else FAILED, tag] += 1


def _visits(steps: tuple[Step, ...]) -> Iterator[list[Step]]:
    """The steps of each visit to a state: turns of several seats in one state are simultaneous, of one seat are not."""
    visit: list[Step] = []
    for step in steps:
        if visit and (step.state != visit[0].state or step.seat in {said.seat for said in visit}):
            yield visit
            visit = []
        visit.append(step)
    if visit:
        yield visit
