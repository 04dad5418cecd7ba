"""Samples from a transformers model, with the turns of all running episodes in one batch."""

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache, DynamicLayer

from turnwise.agents.chat import ChatTemplate
from turnwise.agents.transformers_cache import KeyValues, PrefixStore, Stored
from turnwise.agents.transformers_sampling import Sampler, StopMatcher, decode
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Finish, Reply

# In one forward pass, padding included. Bounds its memory; on a CPU, fewer are a little faster.
PREFILL_TOKENS = 2048
# 64 dialogues of a thousand tokens: 0.2 GB for the tiny models, 1.8 GB for one of 1.5 billion parameters.
PREFIX_TOKENS = 65_536


@dataclass(slots=True, eq=False)
class Row:
    """A reply that is being sampled."""

    prompt: list[int]
    matcher: StopMatcher
    budget: int
    seed: int
    temperature: float
    top_p: float
    future: "asyncio.Future[None]"
    version: int = 0
    ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    finish: Finish | None = None
    stop: str | None = None

    @property
    def fed(self) -> int:
        """How many of its tokens have keys and values: all but the last."""
        return len(self.prompt) + len(self.ids) - 1

    def take(self, token: int, log_probability: float, ends: frozenset[int]) -> None:
        """Appends a sampled token and notices where it ends the reply."""
        self.ids.append(token)
        self.log_probabilities.append(log_probability)
        if stop := self.matcher.match(self.ids):
            self.finish, self.stop = "stop", stop
        elif token in ends:
            self.finish = "end"
        elif len(self.ids) == self.budget:
            self.finish = "length"


class Batch:
    """The rows that are being decoded together, from the first request until none is left."""

    def __init__(self, engine: "TransformersEngine", loop: asyncio.AbstractEventLoop) -> None:
        self.waiting: deque[Row] = deque()
        self._joining: list[tuple[Row, Stored | None]] = []
        self._rows: list[Row] = []
        self._stale = True
        self._engine = engine
        self._device = engine.model.device
        self._cache = KeyValues(engine._layers, limit=(engine.max_running, engine.context))
        self.loop = loop
        self.task = loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self.waiting or self._rows:
                self._step()
                # Replies are handed out here, and the turns that follow them come in.
                await asyncio.sleep(0)
        except Exception as error:
            for row in (*self._rows, *(row for row, _ in self._joining), *self.waiting):
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
                self._joining.append((row, self._engine._prefixes.longest(row.prompt)))
        if self._joining:
            columns = 1 + max(len(row.prompt) for row, _ in self._joining)
            self._cache.reserve(len(self._rows) + len(self._joining), columns)
        # Alike lengths together, since the rest is padding.
        self._joining.sort(key=_new_tokens)
        while self._joining:
            count = max(1, PREFILL_TOKENS // _new_tokens(self._joining[-1]))
            self._prefill(self._joining[-count:])
            del self._joining[-count:]

    def _prefill(self, joining: Sequence[tuple[Row, Stored | None]]) -> None:
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
            if stored is not None:
                self._cache.load(first + index, stored)
            self._engine.prompt_tokens += end
            self._engine.prefix_tokens_reused += end - new
        plain = bool((positions[:, 0] == 0).all())
        logits = self._forward(torch.from_numpy(tokens), torch.from_numpy(positions), first, columns, plain)
        rows = [row for row, _ in joining]
        self._rows.extend(rows)
        self._stale = True
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
            row.take(token, log_probability, self._engine._ends)
            if row.finish is not None or row.future.done():
                done.append(index)
        for index in reversed(done):
            self._leave(index)

    def _leave(self, index: int) -> None:
        self._stale = True
        row, last = self._rows[index], self._rows.pop()
        prefixes = self._engine._prefixes
        if not row.future.done():
            if row.version == self._engine.version and row.fed <= prefixes.limit:
                prefixes.put((row.prompt + row.ids)[: row.fed], self._cache.copy(index, row.fed))
            row.future.set_result(None)
        if last is not row:
            self._rows[index] = last
            self._cache.move(len(self._rows), index, last.fed)


def _new_tokens(joining: tuple[Row, Stored | None]) -> int:
    """How much of a row's prompt has to be computed."""
    row, stored = joining
    return len(row.prompt) - (0 if stored is None else len(stored[0][0]))


class TransformersEngine:
    """Continuous batching over one model: turns join the running batch as they come and leave it as they end.

    Nothing is started or closed: the batch is decoded by a task that lives while there are requests. The model is used
    where it lies and as it is, so a trainer can hand over the one it trains; it then sets `version`, which also
    forgets the keys and values of the old weights.

    Between the turns of an episode the engine keeps at most `prefix_tokens` tokens' keys and values, and computes only
    what a prompt adds to what it has kept; 0 keeps none. `prompt_tokens` counts the tokens of all prompts so far, and
    `prefix_tokens_reused` those of them that it did not compute again. `max_running` bounds the batch.

    A reply's seed alone decides its random numbers, but not the last bits of its logits: matrix products round
    differently in batches of different sizes. In float32 that moves log-probabilities by about 1e-6, and a sampled
    token once in about a million; in bfloat16, far more often.

    Raises `InputError` for a tokenizer that `ChatTemplate` refuses, and for a model with other than full attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        version: int = 0,
        max_running: int = 64,
        prefix_tokens: int = PREFIX_TOKENS,
    ) -> None:
        if max_running < 1:
            raise InputError(f"max_running must be at least 1; got {max_running}")
        self.model = model
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.name = name or str(model.config.name_or_path) or type(model).__name__
        self.max_running = max_running
        self.context = int(getattr(model.config, "max_position_embeddings", 2**31))
        self.prompt_tokens = 0
        self.prefix_tokens_reused = 0
        self._ends = _end_tokens(model, tokenizer)
        self._layers = _full_attention_layers(model)
        self._matchers: dict[tuple[str, ...], StopMatcher] = {}
        self._prefix_limit = prefix_tokens
        self._batch: Batch | None = None
        self.version = version

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        max_running: int = 64,
        prefix_tokens: int = PREFIX_TOKENS,
    ) -> "TransformersEngine":
        """Loads a checkpoint folder or a model of the Hugging Face hub.

        `dtype` is by default float32 on a CPU, where half precision is slow, and the saved one elsewhere.
        """
        if isinstance(path, Path) or path.startswith((".", "/", "~")) or Path(path).is_dir():
            path = Path(path).expanduser()
            if not path.is_dir():
                raise InputError(f"a model must be a checkpoint folder or a hub id; there is no folder {path}")
        target = torch.device(device)
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype or (torch.float32 if target.type == "cpu" else "auto")
            )
            tokenizer = load_tokenizer(path)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(
                f"cannot load a model and its tokenizer from {path} ({reason}): give the folder that save_pretrained "
                "wrote for both, or the id of a model on the Hugging Face hub"
            ) from error
        model.to(target)  # type: ignore[arg-type]
        return cls(model, tokenizer, name=str(path), max_running=max_running, prefix_tokens=prefix_tokens)

    @property
    def version(self) -> int:
        """The policy version stamped on each reply that begins now."""
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        self._version = version
        self._prefixes = PrefixStore(self._prefix_limit)

    async def sample(
        self,
        prompt: Sequence[int],
        *,
        stops: tuple[str, ...],
        max_tokens: int,
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Reply:
        """Continues `prompt` until a closing tag, an end of sequence, `max_tokens`, or the end of the model's context.

        Raises ValueError for a prompt that is empty or fills the context.
        """
        room = self.context - len(prompt)
        if not prompt or room < 1:
            raise ValueError(f"a prompt must have from 1 to {self.context - 1} tokens; this one has {len(prompt)}")
        if max_tokens < 1:
            raise ValueError(f"a turn must have room for at least 1 token; max_tokens is {max_tokens}")
        future = asyncio.get_running_loop().create_future()
        row = Row(list(prompt), self._matcher(stops), min(max_tokens, room), seed, temperature, top_p, future)
        self._join(row)
        await future
        assert row.finish is not None, "a row without an end has no result"
        words = row.ids[:-1] if row.finish == "end" else row.ids
        return Reply(
            text=decode(self.tokenizer, words),
            token_count=len(row.ids),
            finish=row.finish,
            stop=row.stop,
            token_ids=tuple(row.ids),
            log_probabilities=tuple(row.log_probabilities),
            prompt_token_ids=tuple(row.prompt),
            tokenizer=self.template.fingerprint,
            model=self.name,
            version=row.version,
        )

    def _matcher(self, stops: tuple[str, ...]) -> StopMatcher:
        if stops not in self._matchers:
            self._matchers[stops] = StopMatcher(self.tokenizer, stops)
        return self._matchers[stops]

    def _join(self, row: Row) -> None:
        loop = asyncio.get_running_loop()
        batch = self._batch
        if batch is None or batch.task.done() or batch.loop is not loop:
            if batch is not None and not batch.task.done() and batch.loop.is_running():
                raise RuntimeError("an engine serves one event loop at a time; another one is using it now")
            batch = self._batch = Batch(self, loop)
        batch.waiting.append(row)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint, exactly as its tokenizer.json says.

    AutoTokenizer splits text by the rules of the model's type instead: in a folder of a Qwen2 whose tokenizer is not
    Qwen's (a DeepSeek-R1-Distill's, say) it silently gives other token ids than those that the model was trained on.
    """
    # transformers would make an empty tokenizer up.
    if isinstance(path, Path) and not (path / "tokenizer.json").exists():
        raise ValueError("it holds no tokenizer.json; call tokenizer.save_pretrained for this folder")
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(path)
    return tokenizer


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokenizer's end of sequence, and those of the model's generation settings (chat models often have two)."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    more = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in (tokenizer.eos_token_id, *more) if token is not None)


def _full_attention_layers(model: PreTrainedModel) -> int:
    """How many layers the model has, once it is known that each attends to every column."""
    layers = DynamicCache(config=model.config).layers
    other = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    attention = str(model.config._attn_implementation)
    if other or attention not in ("sdpa", "eager"):
        raise InputError(
            f"the transformers engine needs full attention by 'sdpa' or 'eager' in every layer; this model has "
            f"{', '.join(other) or repr(attention)}: load it with attn_implementation='sdpa', or serve it with vLLM"
        )
    return len(layers)
