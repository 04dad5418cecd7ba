"""Samples from a transformers model, with the turns of all running episodes in one batch."""

import asyncio
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache, DynamicLayer

from turnwise.agents.chat import ChatTemplate
from turnwise.agents.engine import Engine, Request
from turnwise.agents.transformers_batch import Batch, Row
from turnwise.agents.transformers_cache import PrefixStore
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Reply

# 64 dialogues of a thousand tokens: 0.2 GB for the tiny models, 1.8 GB for one of 1.5 billion parameters.
PREFIX_TOKENS = 65_536


class TransformersEngine(Engine):
    """Continuous batching over one model: turns join the running batch as they come and leave it as they end.

    Nothing is started or closed: the batch is decoded by a task that lives while there are requests. The model is used
    where it lies and as it is, so a trainer can hand over the one it trains; it then sets `version`, which also
    forgets the keys and values of the old weights.

    The engine keeps the keys and values of the latest prompts and replies, at most `prefix_tokens` tokens in all, and
    computes only what a prompt adds to the longest beginning, of 16 tokens or more, that it shares with one of them:
    with earlier turns of its episode, or with other samples of the same prompt, also when they are asked for at once.
    What is longer than `prefix_tokens` is not kept, so 0 shares nothing. `max_running` bounds the batch.

    A reply's seed alone decides its random numbers, but not the last bits of its logits: matrix products round
    differently in batches of different sizes, and where a prefix was computed apart. In float32 that moves
    log-probabilities by about 1e-6, and a sampled token once in about a million; in bfloat16, far more often.

    Raises `InputError` as every engine does, and for a model with other than full attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        version: int = 0,
        max_running: int = 64,
        prefix_tokens: int = PREFIX_TOKENS,
    ) -> None:
        if max_running < 1:
            raise InputError(f"max_running must be at least 1; got {max_running}")
        super().__init__(
            tokenizer,
            name=name or str(model.config.name_or_path) or type(model).__name__,
            context=int(getattr(model.config, "max_position_embeddings", 2**31)),
            end_tokens=model.generation_config.eos_token_id if model.generation_config else None,
        )
        self.model = model
        self.max_running = max_running
        self.layers = _full_attention_layers(model)
        self._prefix_limit = prefix_tokens
        self._batch: Batch | None = None
        self.version = version

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        max_running: int = 64,
        prefix_tokens: int = PREFIX_TOKENS,
    ) -> "TransformersEngine":
        """Loads a checkpoint folder or a model of the Hugging Face hub.

        `dtype` is by default float32 on a CPU, where half precision is slow, and the saved one elsewhere.
        """
        path = checkpoint(path)
        try:
            # Nothing lies there yet: what is wrong with the device is told before gigabytes of weights are read.
            target = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"device must be 'cpu', or 'cuda' where torch has one; {device!r}: {reason}") from error
        try:
            tokenizer = load_tokenizer(path)
            ChatTemplate(tokenizer)  # what is wrong with it is told before gigabytes of weights are read
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype or (torch.float32 if target.type == "cpu" else "auto")
            )
        except InputError:
            raise
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(
                f"cannot load a model and its tokenizer from {path} ({reason}): give the folder that save_pretrained "
                "wrote for both, or the id of a model on the Hugging Face hub"
            ) from error
        model.to(target)  # type: ignore[arg-type]
        return cls(model, tokenizer, name=str(path), max_running=max_running, prefix_tokens=prefix_tokens)

    @property
    def version(self) -> int:
        """The policy version stamped on each reply that begins now."""
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        self._version = version
        self.prefixes = PrefixStore(self._prefix_limit)

    async def serve(self, request: Request) -> Reply:
        """Samples in one batch with whatever else is asked for."""
        row = Row(
            prompt=np.array(request.prompt, dtype=np.int32),
            matcher=self._matcher(request.stops),
            ends=self.ends,
            budget=request.max_tokens,
            seed=request.seed,
            temperature=request.temperature,
            top_p=request.top_p,
            future=asyncio.get_running_loop().create_future(),
        )
        self._join(row)
        await row.future
        return self._reply(request.prompt, row, row.version)

    def _join(self, row: Row) -> None:
        loop = asyncio.get_running_loop()
        batch = self._batch
        if batch is None or batch.task.done() or batch.loop is not loop:
            if batch is not None and not batch.task.done() and batch.loop.is_running():
                raise RuntimeError("an engine serves one event loop at a time; another one is using it now")
            batch = self._batch = Batch(self, loop)
        batch.waiting.append(row)


def checkpoint(path: str | Path) -> str | Path:
    """A folder as a Path, and a hub id as a str. Raises `InputError` for what looks like a folder and is none."""
    if isinstance(path, Path) or path.startswith((".", "/", "~")) or Path(path).is_dir():
        path = Path(path).expanduser()
        if not path.is_dir():
            raise InputError(f"a model must be a checkpoint folder or a hub id; there is no folder {path}")
    return path


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint, exactly as its tokenizer.json says.

    AutoTokenizer splits text by the rules of the model's type instead: in a folder of a Qwen2 whose tokenizer is not
    Qwen's (a DeepSeek-R1-Distill's, say) it silently gives other token ids than those that the model was trained on.
    """
    # transformers would make an empty tokenizer up.
    if isinstance(path, Path) and not (path / "tokenizer.json").exists():
        raise ValueError("it holds no tokenizer.json; call tokenizer.save_pretrained for this folder")
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(path)
    return tokenizer


def _full_attention_layers(model: PreTrainedModel) -> int:
    """How many layers the model has, once it is known that each attends to every column."""
    layers = DynamicCache(config=model.config).layers
    other = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    attention = str(model.config._attn_implementation)
    if other or attention not in ("sdpa", "eager"):
        raise InputError(
            f"the transformers engine needs full attention by 'sdpa' or 'eager' in every layer; this model has "
            f"{', '.join(other) or repr(attention)}: load it with attn_implementation='sdpa', or serve it with vLLM"
        )
    return len(layers)
