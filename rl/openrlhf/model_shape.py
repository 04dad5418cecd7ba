"""What a model costs in memory and arithmetic, from its config alone: no weight is loaded."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from turnwise.agents.transformers_engine import checkpoint
from turnwise.environments.errors import InputError

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a dense decoder with grouped-query attention and a gated MLP, as Llama and Qwen2 are.

    `looked_up` are the parameters that are only looked up, and not multiplied with: the input embeddings, where the
    output layer does not share them. Sizes are in bytes where `width` (bytes a number) is given.
    """

    parameters: int
    looked_up: int
    vocabulary: int
    context: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int

    @classmethod
    def of(cls, model: str | Path | PretrainedConfig) -> "ModelShape":
        """That of a checkpoint folder, a hub id or a config. The model is built without weights.

        Raises InputError where it is no such model.
        """
        try:
            config = model if isinstance(model, PretrainedConfig) else AutoConfig.from_pretrained(checkpoint(model))
            with torch.device("meta"):
                built = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
            text = config.get_text_config()
            experts = max(int(getattr(text, name, None) or 1) for name in EXPERTS)
            heads, embeddings = int(text.num_attention_heads), built.get_input_embeddings().weight
            head = built.get_output_embeddings()
            shape = cls(
                parameters=sum(weight.numel() for weight in built.parameters()),
                looked_up=0 if head is not None and head.weight is embeddings else embeddings.numel(),
                vocabulary=len(embeddings),
                context=int(text.max_position_embeddings),
                layers=int(text.num_hidden_layers),
                hidden=int(text.hidden_size),
                intermediate=int(text.intermediate_size),
                heads=heads,
                kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
                head_size=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            )
        except InputError:
            raise
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{model} must hold a language model: {str(error).splitlines()[0]}") from error
        if experts > 1:
            raise InputError(f"memory is predicted for dense models; {model} has {experts} experts: plan it by hand")
        return shape

    def kept_by_layer(self, tokens: int, length: int, *, width: int, attention: str) -> int:
        """What one layer keeps of `tokens` tokens, in sequences of `length`, for its backward pass.

        Two norms keep their input and its normalised form in single precision or as much, and each its output; the
        attention its queries, keys, values, output and a sum for each head; the MLP its gate before and after the
        nonlinearity, its other half, and their product. Eager attention keeps its scores, too, which no other does.
        """
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        norms = 2 * self.hidden * (4 + 2 * width)
        attended = width * (2 * queries + 2 * keys) + 4 * self.heads
        if attention == "eager":
            attended += self.heads * length * (4 + (width if width < 4 else 0)) + 2 * width * (queries - keys)
        return tokens * (norms + attended + 4 * width * self.intermediate)

    def kept(self, tokens: int, length: int, *, width: int, attention: str, checkpointing: bool) -> int:
        """What the forward pass keeps below the logits, at the most, until the backward pass needs it.

        With gradient checkpointing that is the input of each layer alone.
        """
        layer = self.kept_by_layer(tokens, length, width=width, attention=attention)
        last = tokens * (self.hidden * (4 + 2 * width) + 2 * width * self.head_size)
        return last + self.layers * (tokens * self.hidden * width if checkpointing else layer)

    def cached(self, *, width: int) -> int:
        """Keys and values of one token, in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * width

    def arithmetic(self, length: float) -> float:
        """Floating-point operations of one token's forward pass, in a sequence of `length`: each looks back over half
        of it, on average.
        """
        attention = 2 * length * self.layers * self.heads * self.head_size
        return 2 * (self.parameters - self.looked_up) + attention
