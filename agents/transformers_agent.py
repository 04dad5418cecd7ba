"""An agent whose turns a transformers model samples in this process."""

from turnwise.agents.engine import EngineAgent
from turnwise.agents.transformers_engine import TransformersEngine

__all__ = ["TransformersAgent", "TransformersEngine"]


class TransformersAgent(EngineAgent):
    """Speaks with a `TransformersEngine`."""

    engine: TransformersEngine
