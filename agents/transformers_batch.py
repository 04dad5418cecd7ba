"""The rows that a transformers engine decodes together: how they join, take a token each, and leave."""

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from turnwise.agents.engine import PartialReply
from turnwise.agents.transformers_cache import SHORTEST_PREFIX, Ids, KeyValues, Stored, common
from turnwise.agents.transformers_sampling import Sampler

if TYPE_CHECKING:
    from turnwise.agents.transformers_engine import TransformersEngine

# In one forward pass, padding included. Bounds its memory; on a CPU, fewer are a little faster.
PREFILL_TOKENS = 2048


@dataclass(slots=True, kw_only=True, eq=False)
class Row(PartialReply):
    """A reply that is being sampled, and what from."""

    prompt: Ids
    seed: int
    temperature: float
    top_p: float
    future: "asyncio.Future[None]"
    version: int = 0

    @property
    def fed(self) -> int:
        """How many of its tokens have keys and values: all but the last."""
        return len(self.prompt) + len(self.ids) - 1


class Batch:
    """The rows that are being decoded together, from the first request until none is left."""

    def __init__(self, engine: "TransformersEngine", loop: asyncio.AbstractEventLoop) -> None:
        self.waiting: deque[Row] = deque()
        self._joining: list[Row] = []
        self._rows: list[Row] = []
        self._stale = True
        self._engine = engine
        self._device = engine.model.device
        self._cache = KeyValues(engine.layers, limit=(engine.max_running, engine.context))
        self.loop = loop
        self.task = loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self.waiting or self._rows:
                self._step()
                # Replies are handed out here, and the turns that follow them come in.
                await asyncio.sleep(0)
        except Exception as error:
            for row in (*self._rows, *self._joining, *self.waiting):
                if not row.future.done():
                    row.future.set_exception(error)
        finally:
            self._cache.clear()

    def _step(self) -> None:
        model = self._engine.model
        was_training = model.training
        if was_training:
            model.train(False)
        try:
            with torch.inference_mode():
                self._admit()
                if self._rows:
                    self._decode()
        finally:
            if was_training:
                model.train(True)

    def _admit(self) -> None:
        """Computes the prompts of waiting rows and samples their first tokens."""
        while self.waiting and len(self._rows) + len(self._joining) < self._engine.max_running:
            row = self.waiting.popleft()
            if not row.future.done():
                row.version = self._engine.version
                self._joining.append(row)
        if self._joining:
            columns = 1 + max(len(row.prompt) for row in self._joining)
            self._cache.reserve(len(self._rows) + len(self._joining), columns)
        while self._joining:
            ready, later = self._ready()
            ready.sort(key=_new_tokens)
            while ready:
                # Alike lengths together, since the rest is padding: most of all where a row shares all but one token.
                width = _new_tokens(ready[-1])
                alike = [pair for pair in ready if 4 * _new_tokens(pair) >= width]
                alike = alike[-max(1, PREFILL_TOKENS // width) :]
                self._prefill(alike)
                del ready[-len(alike) :]
            self._joining = later

    def _ready(self) -> tuple[list[tuple[Row, Stored]], list[Row]]:
        """The joining rows to compute now, with what is kept of them, and those that will share what these compute."""
        prefixes = self._engine.prefixes
        ready: list[tuple[Row, Stored]] = []
        later = []
        shared: Ids = np.empty(0, dtype=np.int32)
        # In this order a prompt comes after those that it begins, and has most in common with the last one shared.
        for row in sorted(self._joining, key=lambda row: row.prompt.tobytes(), reverse=True):
            stored = prefixes.longest(row.prompt)
            known = len(row.prompt) - _new_tokens((row, stored))
            if common(shared, row.prompt) - known >= SHORTEST_PREFIX:
                later.append(row)
            else:
                ready.append((row, stored))
                if len(row.prompt) <= prefixes.limit:
                    shared = row.prompt
        return ready, later

    def _prefill(self, joining: Sequence[tuple[Row, Stored]]) -> None:
        first = len(self._rows)
        width = max(_new_tokens(pair) for pair in joining)
        columns = max(len(row.prompt) for row, _ in joining)
        # Padded on the left, so that every row's last query is its last token. Padding is written to a spare column.
        tokens = np.zeros((len(joining), width), dtype=np.int64)
        positions = np.full((len(joining), width), columns, dtype=np.int64)
        for index, (row, stored) in enumerate(joining):
            end, new = len(row.prompt), _new_tokens((row, stored))
            tokens[index, width - new :] = row.prompt[end - new :]
            positions[index, width - new :] = np.arange(end - new, end)
            self._cache.load(first + index, stored)
            self._engine.prompt_tokens += end
            self._engine.prefix_tokens_reused += end - new
        plain = bool((positions[:, 0] == 0).all())
        logits = self._forward(torch.from_numpy(tokens), torch.from_numpy(positions), first, columns, plain)
        rows = [row for row, _ in joining]
        self._rows.extend(rows)
        self._stale = True
        for index, (row, stored) in enumerate(joining, start=first):
            if _new_tokens((row, stored)) >= SHORTEST_PREFIX:
                self._keep(index, row.prompt)
        counts = torch.zeros(len(rows), dtype=torch.long, device=self._device)
        self._take(first, *self._sampler_of(rows)(logits, counts))

    def _sampler_of(self, rows: Sequence[Row]) -> Sampler:
        return Sampler(
            [row.seed for row in rows], [row.temperature for row in rows], [row.top_p for row in rows], self._device
        )

    def _refresh(self) -> None:
        """The state of the rows as arrays, after rows joined or left."""
        lengths = [row.fed for row in self._rows]
        self._longest, self._alike = max(lengths), min(lengths) == max(lengths)
        self._lengths = torch.tensor(lengths, device=self._device)
        self._tokens = torch.tensor([row.ids[-1] for row in self._rows], device=self._device)
        self._counts = torch.tensor([len(row.ids) for row in self._rows], device=self._device)
        self._sampler = self._sampler_of(self._rows)
        self._stale = False

    def _decode(self) -> None:
        if self._stale:
            self._refresh()
        columns = self._longest + 1
        self._cache.reserve(len(self._rows), columns)
        logits = self._forward(self._tokens[:, None], self._lengths[:, None], 0, columns, self._alike)
        self._tokens, log_probabilities = self._sampler(logits, self._counts)
        self._lengths = self._lengths + 1
        self._counts = self._counts + 1
        self._longest += 1
        self._take(0, self._tokens, log_probabilities)

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, first: int, columns: int, plain: bool
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] after the last of each row's `tokens` [rows, queries], at `positions` likewise.

        The rows from `first` on see their own columns up to each position. `plain`: no row differs from another in
        that, so that the model's own causal mask will do, which is faster.
        """
        model = self._engine.model
        tokens, positions = tokens.to(self._device), positions.to(self._device)
        self._cache.aim(slice(first, first + len(tokens)), positions, columns)
        mask = None
        if not plain:
            unseen = torch.arange(columns, device=self._device) > positions[:, None, :, None]
            mask = torch.zeros(unseen.shape, dtype=model.dtype, device=self._device)
            mask.masked_fill_(unseen, torch.finfo(model.dtype).min)
        logits: torch.Tensor = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    def _take(self, first: int, tokens: torch.Tensor, log_probabilities: torch.Tensor) -> None:
        """Gives the rows from `first` on their new token, and lets go of those that are done."""
        sampled: list[float] = log_probabilities.tolist()
        if not math.isfinite(sum(sampled)):
            raise FloatingPointError("the model's logits are not finite numbers: its weights have diverged")
        done = []
        for index, (token, log_probability) in enumerate(zip(tokens.tolist(), sampled, strict=True), start=first):
            row = self._rows[index]
            row.take(token, log_probability)
            if row.finish is not None or row.future.done():
                done.append(index)
        for index in reversed(done):
            self._leave(index)

    def _leave(self, index: int) -> None:
        self._stale = True
        row = self._rows[index]
        if not row.future.done():
            self._keep(index, np.append(row.prompt, np.array(row.ids[:-1], dtype=np.int32)))
            row.future.set_result(None)
        last = self._rows.pop()
        if last is not row:
            self._rows[index] = last
            self._cache.move(len(self._rows), index, last.fed)

    def _keep(self, index: int, ids: Ids) -> None:
        """Lets later prompts share the first columns of a row, those of `ids`."""
        prefixes = self._engine.prefixes
        if self._rows[index].version == self._engine.version and len(ids) <= prefixes.limit:
            prefixes.put(ids, self._cache.copy(index, len(ids)))


def _new_tokens(joining: tuple[Row, Stored]) -> int:
    """How much of a row's prompt has to be computed."""
    row, stored = joining
    return len(row.prompt) - (len(stored[0][0]) if stored else 0)
