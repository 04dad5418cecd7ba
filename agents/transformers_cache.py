"""Keys and values: of the rows that are being decoded, and of the sequences whose beginnings later prompts share."""

import bisect
import itertools
from collections import OrderedDict

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache

Ids = npt.NDArray[np.int32]

Stored = list[tuple[torch.Tensor, torch.Tensor]]
"""The keys and values of one sequence, per layer, each of shape [columns, heads, dim]; empty where there are none."""

# To share fewer tokens is not worth a mask, let alone a forward pass that others wait for.
SHORTEST_PREFIX = 16


class KeyValues(Cache):
    """Keys and values of all running rows, per layer one buffer of shape [rows, columns, heads, dim].

    Row r holds its tokens in the columns 0, 1, 2, ...: there are no holes, so a row joins by being written behind the
    last one, and leaves by having the last one moved onto it. `aim` says where the next forward pass writes.
    """

    def __init__(self, layers: int, limit: tuple[int, int]) -> None:
        super().__init__(layers=[])
        self.layer_buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._layers = layers
        self.limit = limit
        self.capacity = (0, 0)

    def aim(self, rows: slice, positions: torch.Tensor, columns: int) -> None:
        """Write to `rows` at the columns `positions` [rows, queries]; read the first `columns` columns."""
        self._rows, self._positions, self._columns = rows, positions, columns
        self._index = torch.arange(rows.start, rows.stop, device=positions.device)[:, None]

    def reserve(self, rows: int, columns: int) -> None:
        """Make room, doubling up to the limit, so that the copies stay rare."""
        old_rows, old_columns = self.capacity
        if rows > old_rows or columns > old_columns:
            self.capacity = (
                old_rows if rows <= old_rows else max(rows, min(2 * old_rows, self.limit[0])),
                old_columns if columns <= old_columns else max(columns, min(2 * old_columns, self.limit[1])),
            )
            for layer, (keys, values) in enumerate(self.layer_buffers):
                self.layer_buffers[layer] = (self._grown(keys), self._grown(values))

    def _grown(self, old: torch.Tensor) -> torch.Tensor:
        # Zeros, since a masked column still enters the weighted sum, and 0 x NaN is NaN.
        new = old.new_zeros(*self.capacity, *old.shape[2:])
        new[: old.shape[0], : old.shape[1]] = old
        return new

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by each attention layer with its new keys and values, both [rows, heads, queries, dim]."""
        new = (key_states.transpose(1, 2), value_states.transpose(1, 2))
        buffers = self._buffers(layer_idx, new)
        for buffer, states in zip(buffers, new, strict=True):
            buffer[self._index, self._positions] = states
        keys, values = (buffer[self._rows, : self._columns].transpose(1, 2) for buffer in buffers)
        return keys, values

    def _buffers(self, layer: int, like: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if layer == len(self.layer_buffers):
            keys, values = (states.new_zeros(*self.capacity, *states.shape[-2:]) for states in like)
            self.layer_buffers.append((keys, values))
        return self.layer_buffers[layer]

    def move(self, source: int, target: int, columns: int) -> None:
        """Copies a row onto another."""
        for buffer in itertools.chain.from_iterable(self.layer_buffers):
            buffer[target, :columns] = buffer[source, :columns]

    def load(self, row: int, stored: Stored) -> None:
        """Begins a row with what was computed before."""
        for layer, kept in enumerate(stored):
            for buffer, states in zip(self._buffers(layer, kept), kept, strict=True):
                buffer[row, : len(states)] = states

    def copy(self, row: int, columns: int) -> Stored:
        """The first `columns` columns of a row."""
        return [(keys[row, :columns].clone(), values[row, :columns].clone()) for keys, values in self.layer_buffers]

    def clear(self) -> None:
        """Gives the memory back."""
        self.layer_buffers.clear()
        self.capacity = (0, 0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before the queries of this forward pass; transformers asks for it."""
        return self._columns - self._positions.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns that this forward pass reads, and the first of them; transformers asks for it."""
        return self._columns, 0

    def __len__(self) -> int:
        return self._layers


class PrefixStore:
    """Keys and values by token ids: at most `limit` tokens, the least recently used leave.

    What is kept is never a prefix of something else that is kept: of two such, the longer one serves.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[bytes, Stored] = OrderedDict()
        # The same keys in order: what has most in common with a key stands next to it.
        self._order: list[bytes] = []
        self._tokens = 0

    def put(self, ids: Ids, stored: Stored) -> None:
        """Keeps the keys and values of `ids`."""
        key = ids.tobytes()
        place = bisect.bisect_left(self._order, key)
        if place < len(self._order) and self._order[place].startswith(key):
            self._kept.move_to_end(self._order[place])
            return
        if place and key.startswith(self._order[place - 1]):
            self._drop(self._order[place - 1])
        bisect.insort(self._order, key)
        self._kept[key] = stored
        self._tokens += len(ids)
        while self._tokens > self.limit:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: bytes) -> None:
        del self._kept[key]
        del self._order[bisect.bisect_left(self._order, key)]
        self._tokens -= len(key) // 4

    def longest(self, prompt: Ids) -> Stored:
        """What is kept of the longest prefix of `prompt`, its last token excepted: its logits have to be computed."""
        place = bisect.bisect_left(self._order, prompt.tobytes())
        neighbours = self._order[max(0, place - 1) : place + 1]
        sizes = {common(np.frombuffer(key, np.int32), prompt[:-1]): key for key in neighbours}
        size = max(sizes, default=0)
        if size < SHORTEST_PREFIX:
            return []
        self._kept.move_to_end(sizes[size])
        return [(keys[:size], values[:size]) for keys, values in self._kept[sizes[size]]]


def common(first: Ids, second: Ids) -> int:
    """The length of the longest common prefix."""
    size = min(len(first), len(second))
    differ = first[:size] != second[:size]
    return int(differ.argmax()) if differ.any() else size
