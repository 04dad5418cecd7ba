"""Agents whose turns an OpenAI-compatible server samples, through the `openai` client."""

import itertools
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field, FiniteFloat

from turnwise.agents.agent import Agent
from turnwise.agents.chat import ChatTemplate, decode
from turnwise.agents.engine import StopMatcher, check_sampling
from turnwise.agents.server_connection import Json, Line, PassingError, Server
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Finish, Reply, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatServerAgent", "Server", "ServerAgent", "TokenServerAgent"]

# vLLM takes what a request does not say from the model's generation_config.json, which often cuts or penalises tokens.
WHOLE_DISTRIBUTION: Mapping[str, Json] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


class ServerAgent(Agent):
    """Speaks with a server's model, at its own temperature and top-p; how is for its two subclasses to say.

    Agents that share a server share its limits. `name` is what their replies carry as `model`, by default the server's
    model.
    """

    def __init__(self, server: Server, *, temperature: float = 1.0, top_p: float = 1.0, name: str = "") -> None:
        check_sampling(temperature, top_p)
        self.server = server
        self.temperature = temperature
        self.top_p = top_p
        self.name = name or server.model

    @abstractmethod
    def request(self, turn: Turn, seed: int) -> dict[str, Json]:
        """What the server is asked for: the same for the same turn and seed. Raises InputError as `reply` does."""

    @abstractmethod
    async def attempt(self, line: Line, turn: Turn, request: Mapping[str, Json]) -> Reply:
        """The reply that one of the server's URLs gives, if it gives one."""

    async def reply(self, turn: Turn, seed: int) -> Reply:
        """Asks the server for the turn, again and elsewhere where need be."""
        request = self.request(turn, seed)
        heard = itertools.takewhile(lambda message: message.role != "assistant", turn.messages)
        opening = "\n".join(message.text for message in heard)
        return await self.server.ask(lambda line: self.attempt(line, turn, request), seed=seed, opening=opening)

    def _sampling(self, turn: Turn, seed: int) -> dict[str, Json]:
        return {
            "model": self.server.model,
            "max_tokens": turn.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": seed % 2**63,
        }


class TokenServerAgent(ServerAgent):
    """Token ids in, token ids and log-probabilities out: what a vLLM server (0.10.2 or later) offers.

    `tokenizer` is the served model's (`transformers_engine.load_tokenizer`). With it prompts are made as for a model in
    this process, and replies are read from their ids. Before the first turn at each URL the whole vocabulary is
    compared with the server's, and every reply's ids with its text.

    Raises InputError where a control token is not one token, and where the server speaks no token ids, has another
    vocabulary, or gives log-probabilities of another distribution than the one that was sampled from: at a temperature
    or top-p other than 1 it must be started with `--logprobs-mode processed_logprobs`. A prompt that fills the context,
    and ids that are not those of the text, are a ValueError.
    """

    def __init__(
        self,
        server: Server,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        name: str = "",
    ) -> None:
        super().__init__(server, temperature=temperature, top_p=top_p, name=name)
        check_sampling(temperature, top_p, by_vllm=True)
        self.template = ChatTemplate(tokenizer)
        self._added = tokenizer.get_added_vocab()
        self._contexts: dict[str, int] = {}

    def request(self, turn: Turn, seed: int) -> dict[str, Json]:
        """A completion of the prompt's ids. Tags that are tokens stop by their ids, the others by their text."""
        self.template.check_control_tokens(turn)
        return {
            **self._sampling(turn, seed),
            **WHOLE_DISTRIBUTION,
            "prompt": self.template.prompt(turn),
            "stop": [tag for tag in turn.stops if tag not in self._added],
            "stop_token_ids": [self._added[tag] for tag in turn.stops if tag in self._added],
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }

    async def attempt(self, line: Line, turn: Turn, request: Mapping[str, Json]) -> Reply:
        """The completion, within what the server's context leaves of the budget."""
        prompt = self.template.prompt(turn)
        context = await self._checked(line)
        if len(prompt) >= context:
            raise ValueError(f"a prompt must have from 1 to {context - 1} tokens; this one has {len(prompt)}")
        version = self.server.version
        budget = min(turn.max_tokens, context - len(prompt))
        answer = await line.post("/completions", {**request, "max_tokens": budget}, _Completion)
        choice = answer.choices[0]
        reason = _ended(choice.finish_reason)
        if not choice.token_ids or choice.logprobs is None:
            raise InputError(
                f"a token-exact server must return token ids and log-probabilities; {line.url} does not: serve the "
                "model with vLLM 0.10.2 or later, or use ChatServerAgent"
            )
        ids, logs = choice.token_ids, choice.logprobs.token_logprobs
        # Which tag it was is told as by every engine: of several that a token completes, vLLM names any.
        by_tag = choice.stop_reason in [self._added.get(tag, tag) for tag in turn.stops]
        stop = StopMatcher(self.template.tokenizer, turn.stops).match(ids) if by_tag else None
        finish: Finish = "stop" if stop else "length" if reason == "length" else "end"
        all_but_last, whole = (decode(self.template.tokenizer, said) for said in (ids[:-1], ids))
        agree = _agree(choice.text, all_but_last, whole) and by_tag == (stop is not None)
        if len(ids) != len(logs) or len(ids) > budget or not agree:
            raise ValueError(
                f"the token ids of a reply must be those of its text, each with a log-probability, {budget} at most; "
                f"{line.url} gave {len(ids)} ids for {whole[:60]!r} and {len(logs)} log-probabilities, with the text "
                f"{choice.text[:60]!r}: serve the model with the tokenizer that it was trained with, and give that here"
            )
        return Reply(
            text=all_but_last if finish == "end" else whole,
            token_count=len(ids),
            finish=finish,
            stop=stop,
            token_ids=tuple(ids),
            log_probabilities=tuple(logs),
            prompt_token_ids=tuple(prompt),
            tokenizer=self.template.fingerprint,
            model=self.name,
            version=version,
        )

    async def _checked(self, line: Line) -> int:
        """The tokens that prompt and reply may have together, once the server is known to be fit for this agent."""
        async with line.checking:
            if line.url not in self._contexts:
                await self._check_vocabulary(line)
                if self.temperature not in (0, 1) or self.top_p < 1:
                    await self._check_log_probabilities(line)
                tokenized = await line.post(
                    f"{line.root}/tokenize", {"model": self.server.model, "prompt": "."}, _Tokenized
                )
                self._contexts[line.url] = tokenized.max_model_len
        return self._contexts[line.url]

    async def _check_vocabulary(self, line: Line) -> None:
        every = sorted(self.template.tokenizer.get_vocab().values())
        theirs = await line.post(f"{line.root}/detokenize", {"model": self.server.model, "tokens": every}, _Detokenized)
        # White space aside, which some tokenizers clean up.
        if "".join(theirs.prompt.split()) != "".join(decode(self.template.tokenizer, every).split()):
            raise InputError(
                f"the tokenizer must have the vocabulary of the served model; its {len(every)} tokens read otherwise "
                f"at {line.url}: give load_tokenizer the folder or name of the model {self.server.model!r}"
            )

    async def _check_log_probabilities(self, line: Line) -> None:
        """That the likeliest token is likelier where it is colder; where it is all but certain, nothing shows."""
        request: dict[str, Json] = {"model": self.server.model, "prompt": self.template.tokens("The"), "max_tokens": 1}
        request |= {**WHOLE_DISTRIBUTION, "top_p": 1.0, "seed": 0, "logprobs": 1}
        likeliest = []
        for temperature in (1.0, 0.5):
            answer = await line.post("/completions", {**request, "temperature": temperature}, _Completion)
            top = answer.choices[0].logprobs and answer.choices[0].logprobs.top_logprobs
            likeliest.append(max(top[0].values()) if top and top[0] else 0.0)
        warm, cold = likeliest
        if warm < -1e-3 and abs(warm - cold) <= 0.01 * abs(warm):
            raise InputError(
                "log-probabilities must be those of the distribution that is sampled from; with temperature="
                f"{self.temperature}, top_p={self.top_p} those of {line.url} are not: start the server with "
                "--logprobs-mode processed_logprobs, or sample at temperature 1 and top_p 1"
            )


class ChatServerAgent(ServerAgent):
    """Messages in, text out: any server of chat completions. Its replies are not token-exact and train nothing.

    A plain chat API cannot continue a message of the assistant's, so that a prefill, and a dialogue whose seats share
    one message, are an InputError. It leaves the tag that stopped a reply out of it and does not say which it was; so
    no tags are sent, and the reply is cut behind the first one in it (a tag that is a special token of the vocabulary
    is most often left out too). `token_count` is what the server counted, with what it sampled behind the tag or kept
    to itself as reasoning.

    `extended` is for servers that take vLLM's additions to the API. Then messages are continued
    (`continue_final_message`), and a tag stops the reply. Still the server renders the whole conversation anew for
    each turn, and a template that drops earlier thoughts drops them.

    `budget_field` is what the server calls the token budget; OpenAI's later models know "max_completion_tokens" alone.
    """

    def __init__(
        self,
        server: Server,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        name: str = "",
        extended: bool = False,
        budget_field: str = "max_tokens",
    ) -> None:
        super().__init__(server, temperature=temperature, top_p=top_p, name=name)
        self.extended = extended
        self.budget_field = budget_field

    def request(self, turn: Turn, seed: int) -> dict[str, Json]:
        """A chat completion of the messages, neighbouring ones of the assistant's as one."""
        messages: list[tuple[str, str]] = []
        for role, text in [*((m.role, m.text) for m in turn.messages), ("assistant", turn.prefill)]:
            if role == "assistant" and messages and messages[-1][0] == "assistant":
                messages[-1] = (role, messages[-1][1] + text)
            elif role != "assistant" or text:
                messages.append((role, text))
        request = self._sampling(turn, seed)
        request[self.budget_field] = request.pop("max_tokens")
        request["messages"] = [{"role": role, "content": text} for role, text in messages]
        continues = bool(messages) and messages[-1][0] == "assistant"
        if self.extended:
            request |= WHOLE_DISTRIBUTION
            request |= {"stop": list(turn.stops), "skip_special_tokens": False, "spaces_between_special_tokens": False}
            request |= {"add_generation_prompt": not continues, "continue_final_message": continues}
        elif continues:
            raise InputError(
                f"a chat API begins each reply anew; the turn of seat {turn.seat!r} in state {turn.state!r} continues "
                "a message: use TokenServerAgent, or say extended=True to a server that takes continue_final_message"
            )
        return request

    async def attempt(self, line: Line, turn: Turn, request: Mapping[str, Json]) -> Reply:
        """The message, up to and with the first closing tag."""
        version = self.server.version
        answer = await line.post("/chat/completions", request, _Chat)
        choice = answer.choices[0]
        reason = _ended(choice.finish_reason)
        if answer.usage is None:
            raise InputError(f"a server must count the sampled tokens; {line.url} sends no usage: use another server")
        text = choice.message.content or ""
        if reason == "stop" and choice.stop_reason in turn.stops:
            text += str(choice.stop_reason)
        ends = {text.find(tag) + len(tag): tag for tag in turn.stops if tag in text}
        stop = ends[min(ends)] if ends else None
        return Reply(
            text=text[: min(ends)] if ends else text,
            token_count=answer.usage.completion_tokens,
            finish="stop" if stop else "length" if reason == "length" else "end",
            stop=stop,
            model=self.name,
            version=version,
        )


def _ended(reason: str | None) -> str:
    """How a reply ended: "stop" or "length"."""
    if reason in (None, "abort", "error"):
        raise PassingError(f"the server ended the reply with {reason!r}")
    if reason not in ("stop", "length"):
        raise ValueError(f"a reply must end with 'stop' or 'length'; the server ended it with {reason!r}")
    return str(reason)


def _agree(text: str, all_but_last: str, whole: str) -> bool:
    """Whether the server's text is that of the ids, of the last of which it may hold a part: a tag can end in there.

    Decoders differ in bytes that are no character, and in a space at the beginning.
    """
    text, all_but_last, whole = (
        one.replace("\N{REPLACEMENT CHARACTER}", "").removeprefix(" ") for one in (text, all_but_last, whole)
    )
    return whole.startswith(text) and text.startswith(all_but_last)


class _LogProbabilities(BaseModel):
    token_logprobs: list[FiniteFloat]
    top_logprobs: list[dict[str, float] | None] | None = None


class _CompletionChoice(BaseModel):
    text: str
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    logprobs: _LogProbabilities | None = None


class _Completion(BaseModel):
    choices: list[_CompletionChoice] = Field(min_length=1)


class _Detokenized(BaseModel):
    prompt: str


class _Tokenized(BaseModel):
    max_model_len: int


class _Said(BaseModel):
    content: str | None = None


class _ChatChoice(BaseModel):
    message: _Said
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _Usage(BaseModel):
    completion_tokens: int


class _Chat(BaseModel):
    choices: list[_ChatChoice] = Field(min_length=1)
    usage: _Usage | None = None
