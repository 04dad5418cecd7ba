"""Where and how policies are trained and sampled from on OpenRLHF. Nothing of OpenRLHF is imported to say so."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator


class OpenRLHFSettings(BaseModel):
    """Where and how each policy is trained and sampled from; what it learns is the same, within the rounding.

    - `ranks` processes each train on a part of the sequences, on `gpus_per_rank` of a GPU each: 1, or less to share it,
      or 0 for the CPU. A reference model takes half of that share.
    - `zero_stage`: what DeepSpeed divides among the ranks (ZeRO, arXiv 1910.02054): the optimiser's state, 2: also the
      gradients, 3: also the weights.
    - `precision` of the weights in the forward and backward pass; the optimiser's are in single precision, and so are
      the sums of the gradients of micro-batches, but in stage 1.
    - `attention`: the implementation, by transformers' name. "flash_attention_2" needs bf16 and a GPU.
    - `gradient_checkpointing` trades a second forward pass for memory.
    - `actors` processes are sampled from by `engine`, each on `gpus_per_actor` of a GPU (0: a CPU): "vllm" takes the
      memory of the weights there and `cache_gigabytes` (of 10^9 bytes) for keys and values; "transformers" is for where
      vLLM cannot be had. Each samples up to `max_running` turns at once; `context` is by default the model's own.
    - `colocated`: ranks and actors of a policy stand on the same GPUs and take turns: the engines sleep while the ranks
      learn, and the optimisers' states wait in main memory while the engines sample.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranks: PositiveInt = 1
    gpus_per_rank: Annotated[float, Field(ge=0, le=1)] = 1.0
    zero_stage: Literal[1, 2, 3] = 2
    precision: Literal["bf16", "fp32"] = "bf16"
    attention: Literal["flash_attention_2", "sdpa", "eager"] = "sdpa"
    gradient_checkpointing: bool = False
    engine: Literal["vllm", "transformers"] = "vllm"
    actors: PositiveInt = 1
    gpus_per_actor: Annotated[float, Field(ge=0, le=1)] = 1.0
    cache_gigabytes: PositiveFloat = 1.0
    context: PositiveInt | None = None
    max_running: PositiveInt = 64
    colocated: bool = False

    @model_validator(mode="after")
    def _flash_attention_has_what_it_needs(self) -> "OpenRLHFSettings":
        if self.attention == "flash_attention_2" and (self.precision == "fp32" or not self.gpus_per_rank):
            raise ValueError('flash_attention_2 needs precision="bf16" and a GPU: ask for attention="sdpa"')
        return self

    @model_validator(mode="after")
    def _who_takes_turns_fits_together(self) -> "OpenRLHFSettings":
        if self.colocated and (
            self.ranks != self.actors or self.gpus_per_rank + self.gpus_per_actor > 1 or self.engine != "vllm"
        ):
            raise ValueError(
                f"colocated needs as many ranks as actors, on parts of a GPU that add up to 1 at most, and vLLM, which "
                f"can sleep; got ranks={self.ranks}, actors={self.actors}, gpus_per_rank={self.gpus_per_rank}, "
                f"gpus_per_actor={self.gpus_per_actor}, engine={self.engine!r}"
            )
        return self

    @model_validator(mode="after")
    def _who_sends_to_each_other_has_a_gpu_each(self) -> "OpenRLHFSettings":
        """NCCL refuses a group of which two processes are on one GPU. Nor do the first rank and vLLM's engines form one
        where they take turns, or where the weights come through Ray.
        """
        rank, actor = self.gpus_per_rank, self.gpus_per_actor
        ranks_share = self.ranks > 1 and 0 < rank + actor * self.colocated <= 0.5
        engines_share = (self.actors > 1 and 0 < actor <= 0.5) or (rank and actor and rank + actor <= 1)
        if ranks_share or (engines_share and self.engine == "vllm" and not self.colocated):
            raise ValueError(
                "processes that send each other weights or gradients by NCCL (all ranks; the first rank and vLLM's "
                f"engines, unless colocated) must not share a GPU; got ranks={self.ranks}, actors={self.actors}, "
                f"gpus_per_rank={rank}, gpus_per_actor={actor}, colocated={self.colocated}: use colocated, or whole "
                "GPUs"
            )
        return self

    @property
    def dtype(self) -> str:
        """The precision, by torch's name."""
        return "float32" if self.precision == "fp32" else "bfloat16"
