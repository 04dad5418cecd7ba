"""Where the past of a dialogue is cached."""

from collections.abc import Iterator, Sequence

BLOCK = 32
"""So many tokens are looked up at a time, to find where a dialogue was begun."""


class Homes:
    """Which actor knows how a prompt begins, by the tokens of that beginning; the latest `size` of them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._homes = dict[int, int]()

    def find(self, prompt: Sequence[int]) -> int | None:
        """The actor of the longest beginning that was kept."""
        found = None
        for key in beginnings(prompt):
            found = self._homes.get(key, found)
        return found

    def keep(self, sequence: Sequence[int], actor: int) -> None:
        """Remembers the end of a turn, and not its beginnings: a beginning may be that of all dialogues."""
        for key in (*beginnings(sequence),)[-1:]:
            self._homes.pop(key, None)
            self._homes[key] = actor
        if len(self._homes) > self._size:
            del self._homes[next(iter(self._homes))]

    def clear(self) -> None:
        """Forgets all."""
        self._homes.clear()


def beginnings(tokens: Sequence[int]) -> Iterator[int]:
    """A key for each beginning of whole blocks, from the shortest to the longest."""
    key = 0
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        key = hash((key, *tokens[end - BLOCK : end]))
        yield key
