"""An agent whose turns vLLM samples, on this machine."""

from turnwise.agents.engine import EngineAgent
from turnwise.agents.vllm_engine import VLLMEngine

__all__ = ["VLLMAgent", "VLLMEngine"]


class VLLMAgent(EngineAgent):
    """Speaks with a `VLLMEngine`."""

    engine: VLLMEngine
