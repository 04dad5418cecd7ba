"""What one policy said in a dialogue, as the token sequences that it is trained on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Token ids, and which of them the policy said itself: only those are trained."""

    token_ids: tuple[int, ...]
    mask: tuple[bool, ...]

    @property
    def trained(self) -> int:
        """The number of trained tokens."""
        return sum(self.mask)


def join_turns(turns: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[TokenSequence]:
    """The (prompt ids, said ids) of successive turns, as few sequences as possible.

    A turn whose prompt begins with all that came before it continues that sequence, and what it read in between is not
    trained; any other turn begins a sequence of its own. Either way each said token is trained once, after exactly the
    tokens that were read before it.
    """
    sequences: list[tuple[list[int], list[bool]]] = []
    for prompt, said in turns:
        if not sequences or list(prompt[: len(sequences[-1][0])]) != sequences[-1][0]:
            sequences.append(([], []))
        token_ids, mask = sequences[-1]
        read = prompt[len(token_ids) :]
        token_ids += [*read, *said]
        mask += [False] * len(read) + [True] * len(said)
    return [TokenSequence(tuple(token_ids), tuple(mask)) for token_ids, mask in sequences]
