"""What is said: messages, turns, replies, and the transcript that they add up to.

Those that every turn makes many of are named tuples, which take half the time of frozen dataclasses to make.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from turnwise.environments.problem import Problem

Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "end", "length"]


@dataclass(frozen=True, slots=True)
class Reply:
    """What an agent sampled in one turn.

    `text` is all that was sampled, a closing tag included, the end-of-sequence token excluded. `finish` says what
    ended it: a closing tag, then named by `stop` ("stop"), the model's own end of sequence ("end"), or the turn's
    token budget ("length"). `token_count` is the number of sampled tokens, and nothing but sampled tokens.

    Where the engine works on tokens, `token_ids` are the sampled ids, `log_probabilities` (nats, one per id) those of
    the distribution they were drawn from, and `prompt_token_ids` the ids that the engine read before them; `tokenizer`
    fingerprints the vocabulary that gives all these ids their meaning. Where it does not, they are empty.

    `version` is that of the weights with which the reply began. Where others replaced them before it ended, `versions`
    are those of each token.
    """

    text: str
    token_count: int
    finish: Finish = "end"
    stop: str | None = None
    token_ids: tuple[int, ...] = ()
    log_probabilities: tuple[float, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    tokenizer: str = ""
    model: str = ""
    version: int = 0
    versions: tuple[int, ...] = ()


class Message(NamedTuple):
    """A piece of what a seat may read. Neighbouring assistant messages are one message that is being continued.

    `reply` is set where the text was sampled, so that an engine can append its exact token ids instead of tokenising
    the text again.
    """

    role: Role
    text: str
    reply: Reply | None = None


class Turn(NamedTuple):
    """A request to one seat to speak.

    `state` names the situation in the protocol. The reply continues `messages` and then `prefill`, a text that the
    protocol puts in the seat's mouth and that is not sampled. It ends at the first of the closing tags in `stops`, at
    the model's end of sequence, or after `max_tokens` sampled tokens.
    """

    seat: str
    state: str
    messages: tuple[Message, ...]
    stops: tuple[str, ...]
    max_tokens: int
    prefill: str = ""


class Step(NamedTuple):
    """A turn that was taken: who spoke, in which state of the protocol, after which prefill, and what was said."""

    seat: str
    state: str
    reply: Reply
    prefill: str = ""

    @property
    def text(self) -> str:
        """The turn as a reader sees it: what the protocol put in the seat's mouth, then what was sampled."""
        return self.prefill + self.reply.text


@dataclass(frozen=True, slots=True)
class Transcript:
    """A problem and every step taken on it so far, in the protocol's order (never the order of arrival)."""

    problem: Problem
    steps: tuple[Step, ...] = ()

    def extended(self, *steps: Step) -> "Transcript":
        """The transcript after these further steps."""
        return Transcript(self.problem, self.steps + steps)

    def prefix(self, length: int) -> "Transcript":
        """The transcript as it was after its first `length` steps."""
        return Transcript(self.problem, self.steps[:length])

    @property
    def text(self) -> str:
        """All that was said, in order."""
        return "".join(step.text for step in self.steps)

    @property
    def token_count(self) -> int:
        """Sampled tokens of the whole dialogue, all seats together."""
        return sum(step.reply.token_count for step in self.steps)
