"""What a Ray actor that is sampled from has to offer to a `RolloutEngine`, whichever engine is in it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turnwise.agents.engine import Engine, Request
from turnwise.environments.transcript import Reply

if TYPE_CHECKING:
    import torch


class EngineDiedError(RuntimeError):
    """What was asked of an actor that is no more."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A reply, and what of the two counts of `Engine` came up since the one before."""

    reply: Reply
    prompt_tokens: int
    prefix_tokens_reused: int


@dataclass(frozen=True, slots=True)
class Served:
    """The model as an actor serves it."""

    context: int
    ends: frozenset[int]
    vocabulary: int
    cache_tokens: int
    dtype: "torch.dtype"


class SamplingActor(ABC):
    """An engine in a process of Ray's. Once its weights were replaced, it is to be told by `updated`."""

    engine: Engine
    _counted = (0, 0)

    @abstractmethod
    async def served(self) -> Served:
        """What it serves. Raises EngineDiedError where the engine is no more."""

    @abstractmethod
    async def updated(self, version: int, *, running: bool) -> None:
        """Forgets what it has cached; with `running`, also what running replies have computed, which go on.

        Raises RuntimeError where it cannot.
        """

    @abstractmethod
    def shut_down(self) -> None:
        """Ends what processes it has started."""

    async def reply(self, request: Request) -> Sampled:
        """Samples one turn. Raises EngineDiedError where the engine is no more."""
        reply = await self.engine.serve(request)
        counts = self.engine.prompt_tokens, self.engine.prefix_tokens_reused
        prompt, reused = (now - before for now, before in zip(counts, self._counted, strict=True))
        self._counted = counts
        return Sampled(reply, prompt, reused)
