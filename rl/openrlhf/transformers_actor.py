"""A Ray actor that samples with transformers, for where vLLM cannot be had."""

from collections.abc import Mapping
from pathlib import Path

import torch

from turnwise.agents.transformers_engine import PREFIX_TOKENS, TransformersEngine
from turnwise.rl.openrlhf.sampling_actor import SamplingActor, Served


class TransformersActor(SamplingActor):
    """Samples as `TransformersEngine` does. Its weights come as a state dict, through Ray."""

    def __init__(
        self, model: str | Path, *, device: str, dtype: str, max_running: int, context: int | None, version: int
    ) -> None:
        self.engine: TransformersEngine = TransformersEngine.load(
            model, device=device, dtype=getattr(torch, dtype), max_running=max_running
        )
        self.engine.context = min(context or self.engine.context, self.engine.context)
        self.engine.version = version

    async def served(self) -> Served:
        """What it serves."""
        engine, model = self.engine, self.engine.model
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, torch.nn.Embedding)
        return Served(engine.context, engine.ends, embedding.num_embeddings, PREFIX_TOKENS, model.dtype)

    async def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replaces the weights, while nothing is sampled."""
        self.engine.model.load_state_dict(weights)

    async def updated(self, version: int, *, running: bool) -> None:
        """Forgets what is cached of the old weights."""
        if running:
            raise RuntimeError("what transformers has computed of running replies is of the old weights: let them end")
        self.engine.version = version

    def shut_down(self) -> None:
        """There is no other process."""
