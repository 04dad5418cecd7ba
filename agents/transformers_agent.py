"""An agent whose turns a transformers model samples in this process."""

from dataclasses import replace

from turnwise.agents.agent import Agent
from turnwise.agents.transformers_engine import TransformersEngine
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Reply, Turn

__all__ = ["TransformersAgent", "TransformersEngine"]


class TransformersAgent(Agent):
    """Speaks with an engine's model, at its own temperature and top-p.

    Agents that share an engine share its weights and its batch. `name` is what their replies carry as `model`, by
    default the engine's own.

    A turn of one token whose stops are control tokens (a choice of mode) needs each of them as one token of the
    vocabulary: `InputError` else. A prompt that fills the model's context is a ValueError, so that it ends its own
    episode and no other.
    """

    def __init__(
        self, engine: TransformersEngine, *, temperature: float = 1.0, top_p: float = 1.0, name: str = ""
    ) -> None:
        if temperature < 0 or not 0 < top_p <= 1:
            raise InputError(
                f"temperature must be at least 0 and top_p within (0, 1]; got temperature={temperature}, top_p={top_p}"
            )
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
