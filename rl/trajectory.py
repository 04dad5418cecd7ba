"""What one seat said in an episode, as the exact token sequences that its policy is trained on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Step


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Token ids, and where in them each turn was said, as (start, end) in order: only those tokens are trained."""

    token_ids: tuple[int, ...]
    said: tuple[tuple[int, int], ...]

    @property
    def mask(self) -> tuple[bool, ...]:
        """For each token, whether it was said, and so is trained."""
        mask = [False] * len(self.token_ids)
        for start, end in self.said:
            mask[start:end] = [True] * (end - start)
        return tuple(mask)

    @property
    def trained(self) -> int:
        """The number of trained tokens."""
        return sum(end - start for start, end in self.said)


def join_turns(turns: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[TokenSequence]:
    """The (prompt ids, said ids) of successive turns, as few sequences as possible.

    A turn whose prompt begins with all that came before it continues that sequence, and what it read in between is not
    trained; any other turn begins a sequence of its own. Either way each said token is trained once, after exactly the
    tokens that were read before it.
    """
    sequences: list[tuple[list[int], list[tuple[int, int]]]] = []
    for prompt, said in turns:
        if not sequences or list(prompt[: len(sequences[-1][0])]) != sequences[-1][0]:
            sequences.append(([], []))
        token_ids, spans = sequences[-1]
        token_ids += [*prompt[len(token_ids) :], *said]
        spans.append((len(token_ids) - len(said), len(token_ids)))
    return [TokenSequence(tuple(token_ids), tuple(spans)) for token_ids, spans in sequences]


class SaidTurn(NamedTuple):
    """A turn in a trajectory: the step of the transcript that it was, and its place in the token ids."""

    place: int
    start: int
    end: int
    step: Step


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One token sequence of one seat in one episode. Its turns were said; all other tokens were only read."""

    episode: Episode
    seat: str
    sequence: TokenSequence
    turns: tuple[SaidTurn, ...]


def trajectories(episode: Episode, seat: str) -> list[Trajectory]:
    """All that `seat` said in `episode`: one sequence where each of its prompts continues the last, else several.

    Raises InputError for a turn without token ids and log-probabilities, which cannot be trained on.
    """
    steps = [(place, step) for place, step in enumerate(episode.transcript.steps) if step.seat == seat]
    for _, step in steps:
        reply = step.reply
        if not reply.prompt_token_ids or not (len(reply.token_ids) == len(reply.log_probabilities) > 0):
            raise InputError(
                f"training needs the sampled token ids and a log-probability for each; seat {seat!r} in episode "
                f"{episode.id!r} spoke by {reply.model or 'an agent'!r}, which gave {len(reply.token_ids)} ids and "
                f"{len(reply.log_probabilities)} log-probabilities: fill the seat with a token-exact agent"
            )
    sequences = join_turns((step.reply.prompt_token_ids, step.reply.token_ids) for _, step in steps)
    firsts = accumulate((len(sequence.said) for sequence in sequences), initial=0)
    found = []
    for sequence, first in zip(sequences, firsts, strict=False):
        spoken = zip(steps[first:], sequence.said, strict=False)
        turns = tuple(SaidTurn(place, start, end, step) for (place, step), (start, end) in spoken)
        found.append(Trajectory(episode, seat, sequence, turns))
    return found
