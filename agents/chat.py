"""The chat template: what a seat may read, as the token ids of one tokenizer."""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Message, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for a model's words in the dummy conversations. Plain letters, so that no template strips or escapes it.
MARK = "MARKOFTHEASSISTANT"
REASONING_TAG = re.compile(r"</?\s*(think|thinking|thought|reason|reasoning|rethink|answer|short|long|reflection)\s*>")

Rendered = tuple[tuple[str, str], ...]
"""The (role, text) of neighbouring messages, none of them the assistant's."""


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A hash of the vocabulary, added tokens included: equal where every token id means the same."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


def decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of `ids` as sampled: with special tokens, and with its spaces left alone."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


class ChatTemplate:
    """Renders a turn as prompt token ids, append-only.

    What was rendered once is never rendered again: where a seat's messages only grow, each of its prompts begins with
    its earlier prompt and reply, id for id. Texts that were not sampled with this vocabulary are tokenised message by
    message.

    Raises `InputError` for a tokenizer without a chat template or an end-of-sequence token, and for a template that
    puts words into the model's reply (a forced `<think>`, say), since then the model could not choose them.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint(tokenizer)
        self._check()
        # Every sample of a problem shares its header, and a text is read again at each later turn.
        self._header = functools.lru_cache(maxsize=1024)(self._render_header)
        self._delta = functools.lru_cache(maxsize=1024)(self._render_delta)
        self._cached = functools.lru_cache(maxsize=8192)(self._tokenise)

    def prompt(self, turn: Turn) -> list[int]:
        """The token ids that the reply continues: the messages of `turn`, then its prefill.

        Raises `InputError` where the messages do not begin with a system or user message, and where the template
        cannot add a user message to a conversation without changing what came before.
        """
        if not turn.messages or turn.messages[0].role == "assistant":
            raise InputError(
                f"the messages of a turn must begin with a system or user message; the turn of seat {turn.seat!r} "
                "begins with none: let the protocol put the question first"
            )
        ids: list[int] = []
        for spoken, run in itertools.groupby(turn.messages, key=lambda message: message.role == "assistant"):
            if spoken:
                for message in run:
                    ids.extend(self._spoken(message))
            else:
                heard = tuple((message.role, message.text) for message in run)
                added = self._delta(heard) if ids else self._header(heard)
                # The reply may already hold the end-of-sequence token with which the template closes a message.
                ids.extend(added[1:] if ids and ids[-1] == added[0] == self.tokenizer.eos_token_id else added)
        ids.extend(self.tokens(turn.prefill))
        return ids

    def tokens(self, text: str) -> tuple[int, ...]:
        """The token ids of a text on its own, without any that a tokenizer adds around it."""
        return self._cached(text)

    def check_control_tokens(self, turn: Turn) -> None:
        """Raises `InputError` where a turn of one token, a choice of mode, could not end on each of its tags."""
        if turn.max_tokens > 1:
            return
        if several := [tag for tag in turn.stops if len(self.tokens(tag)) != 1]:
            raise InputError(
                f"a control token must be one token of the vocabulary; {several} of seat {turn.seat!r} are not: call "
                f"tokenizer.add_tokens({several}) and model.resize_token_embeddings(len(tokenizer)), save both, and "
                "train the model to use them"
            )

    def _spoken(self, message: Message) -> tuple[int, ...]:
        reply = message.reply
        # A protocol may show less than was said; then the text, and not the reply, is what the seat may read.
        if reply and reply.token_ids and reply.tokenizer == self.fingerprint and reply.text == message.text:
            return reply.token_ids
        return self.tokens(message.text)

    def _tokenise(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Rendered, prompt: bool) -> str:
        conversation = [{"role": role, "content": text} for role, text in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt),
            )
        except TemplateError as error:
            roles = [role for role, _ in messages]
            raise InputError(
                f"the chat template refuses messages with the roles {roles} ({error}): change the protocol's messages "
                "or the tokenizer's chat_template"
            ) from error

    def _render_header(self, messages: Rendered) -> tuple[int, ...]:
        return self._tokenise(self._render(messages, prompt=True))

    def _render_delta(self, messages: Rendered) -> tuple[int, ...]:
        """What the template adds after the assistant's words: the end of its message, `messages`, the next start."""
        dialogue = (("user", "question"), ("assistant", MARK))
        closing = self._render(dialogue, prompt=False).partition(MARK)[2]
        _, found, added = self._render(dialogue + messages, prompt=True).partition(MARK)
        if not found or not added.startswith(closing) or MARK in added:
            raise InputError(
                "a chat template must keep a conversation as it was when a message is added; this one drops or changes "
                "earlier messages: give the tokenizer a chat_template that renders each message on its own"
            )
        return self._tokenise(added)

    def _check(self) -> None:
        if self.tokenizer.chat_template is None:
            raise InputError("the tokenizer has no chat template: set tokenizer.chat_template, or use a chat model")
        if self.tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-sequence token: set tokenizer.eos_token")
        question = (("user", "question"),)
        opened = self._render(question, prompt=True)
        closed = self._render(question, prompt=False)
        marker = opened[len(closed) :] if opened.startswith(closed) else ""
        # Where the template shows how it begins an assistant message, all that it opens beyond that is forced.
        beginning, found, _ = self._render((*question, ("assistant", MARK)), prompt=False).partition(MARK)
        forced = opened[len(beginning) :].strip() if found and opened.startswith(beginning) else ""
        if tag := REASONING_TAG.search(marker):
            forced = forced or tag.group()
        if forced:
            raise InputError(
                f"a chat template must leave the reply to the model; this one begins every reply with {forced!r}: "
                "remove that from the end of tokenizer.chat_template"
            )
