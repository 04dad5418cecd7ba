"""What an engine is, and the agent that speaks with one."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from turnwise.agents.agent import Agent
from turnwise.agents.chat import ChatTemplate, decode
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Finish, Reply, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Request:
    """A turn to be sampled, as `Engine.sample` is asked for it; prompt and reply fit into the context together."""

    prompt: tuple[int, ...]
    stops: tuple[str, ...]
    max_tokens: int
    seed: int
    temperature: float
    top_p: float


class Engine(ABC):
    """Samples from one model, many turns at once: token ids in, token ids and their log-probabilities out.

    `name` is what replies carry as `model`, and `version` the policy version that they carry. `context` is how many
    tokens prompt and reply can have together, and `ends` are the tokens that end a reply, whichever its stops.

    `prompt_tokens` counts the tokens of all prompts so far, `prefix_tokens_reused` those of them that were not
    computed again. `turnwise.agents.contract` says and tests what all engines have in common.

    Raises `InputError` for a tokenizer that `ChatTemplate` refuses.
    """

    name: str
    version: int

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", *, name: str, context: int, end_tokens: int | list[int] | None
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.name = name
        self.context = context
        # A model's generation settings often name a second one.
        more = end_tokens if isinstance(end_tokens, list) else [end_tokens]
        self.ends = frozenset(int(token) for token in (tokenizer.eos_token_id, *more) if token is not None)
        self.prompt_tokens = 0
        self.prefix_tokens_reused = 0
        self._matchers: dict[tuple[str, ...], StopMatcher] = {}

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
        return await self.serve(Request(tuple(prompt), stops, min(max_tokens, room), seed, temperature, top_p))

    @abstractmethod
    async def serve(self, request: Request) -> Reply:
        """Samples what `sample` was asked for, which is known to fit."""

    def check_sampling(self, temperature: float, top_p: float) -> None:
        """Raises `InputError` for what no turn could be sampled at."""
        check_sampling(temperature, top_p)

    def _matcher(self, stops: tuple[str, ...]) -> "StopMatcher":
        if stops not in self._matchers:
            self._matchers[stops] = StopMatcher(self.tokenizer, stops)
        return self._matchers[stops]

    def _reply(self, prompt: tuple[int, ...], said: "PartialReply", version: int) -> Reply:
        assert said.finish is not None, "a reply without an end is not whole"
        return Reply(
            text=decode(self.tokenizer, said.ids[:-1] if said.finish == "end" else said.ids),
            token_count=len(said.ids),
            finish=said.finish,
            stop=said.stop,
            token_ids=tuple(said.ids),
            log_probabilities=tuple(said.log_probabilities),
            prompt_token_ids=prompt,
            tokenizer=self.template.fingerprint,
            model=self.name,
            version=version,
            versions=tuple(said.versions) if set(said.versions) - {version} else (),
        )


def check_sampling(temperature: float, top_p: float, *, by_vllm: bool = False) -> None:
    """Raises `InputError` for what is no temperature or no nucleus, and for what vLLM would not sample at."""
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise InputError(
            f"temperature must be at least 0 and top_p within (0, 1]; got temperature={temperature}, top_p={top_p}"
        )
    # vLLM takes what lies between as 0.01, and refuses what lies above.
    if by_vllm and not (temperature == 0 or 0.01 <= temperature <= 2):
        raise InputError(f"for vLLM, temperature must be 0 or within [0.01, 2]; got temperature={temperature}")


class EngineAgent(Agent):
    """Speaks with an engine's model, at its own temperature and top-p.

    Agents that share an engine share its weights and its batch. `name` is what their replies carry as `model`, by
    default the engine's own.

    A turn of one token whose stops are control tokens (a choice of mode) needs each of them as one token of the
    vocabulary: `InputError` else. A prompt that fills the model's context is a ValueError, so that it ends its own
    episode and no other.
    """

    def __init__(self, engine: Engine, *, temperature: float = 1.0, top_p: float = 1.0, name: str = "") -> None:
        engine.check_sampling(temperature, top_p)
        self.engine = engine
        self.temperature = temperature
        self.top_p = top_p
        self.name = name or engine.name

    async def reply(self, turn: Turn, seed: int) -> Reply:
        """Samples the turn with the engine."""
        self.engine.template.check_control_tokens(turn)
        reply = await self.engine.sample(
            self.engine.template.prompt(turn),
            stops=turn.stops,
            max_tokens=turn.max_tokens,
            seed=seed,
            temperature=self.temperature,
            top_p=self.top_p,
        )
        return replace(reply, model=self.name)


@dataclass(slots=True, kw_only=True, eq=False)
class PartialReply:
    """A reply that is being sampled, token by token. `finish` is None until a token ends it.

    `versions` are of each token, where the weights may be replaced before the end.
    """

    matcher: "StopMatcher"
    ends: frozenset[int]
    budget: int
    ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: Finish | None = None
    stop: str | None = None

    def take(self, token: int, log_probability: float) -> None:
        """Appends a sampled token and notices where it ends the reply."""
        self.ids.append(token)
        self.log_probabilities.append(log_probability)
        if stop := self.matcher.match(self.ids):
            self.finish, self.stop = "stop", stop
        elif token in self.ends:
            self.finish = "end"
        elif len(self.ids) == self.budget:
            self.finish = "length"


class StopMatcher:
    """Finds the first closing tag as tokens arrive.

    A tag that was added to the tokenizer as a token is found by its id alone. Any other is found in the text, since it
    may span tokens, and may be followed by other characters within its last one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str]) -> None:
        added = tokenizer.get_added_vocab()
        self._by_id = {added[stop]: stop for stop in stops if stop in added}
        self._by_text = [stop for stop in stops if stop not in added]
        # A token decodes to at least one byte, so a tag's text lies within so many last tokens.
        self._reach = max((len(stop.encode()) for stop in self._by_text), default=0)
        self._last = {stop[-1] for stop in self._by_text} | {"\N{REPLACEMENT CHARACTER}"}
        self._may_end: dict[int, bool] = {}
        self._tokenizer = tokenizer

    def match(self, ids: Sequence[int]) -> str | None:
        """The tag that the last of `ids` completes; where it completes several, the one that ends first."""
        if not self._by_text or not self._may_complete(ids[-1]):
            return self._by_id.get(ids[-1])
        tail = decode(self._tokenizer, ids[-self._reach :])
        found = [(tail.find(stop) + len(stop), stop) for stop in self._by_text if stop in tail]
        return min(found)[1] if found else self._by_id.get(ids[-1])

    def _may_complete(self, token: int) -> bool:
        """Whether the token's own text has the last character of a tag: spares nearly all decoding of the tail."""
        if token not in self._may_end:
            piece = decode(self._tokenizer, [token])
            # Some tokenizers drop a space where a text begins.
            self._may_end[token] = any(last in piece or last.isspace() for last in self._last)
        return self._may_end[token]
