"""Samples from a model that vLLM serves, in a process that this one starts, feeds and ends."""

import asyncio
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from itertools import count
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from vllm import SamplingParams  # type: ignore[import-not-found]
from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found]
from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]
from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found]
from vllm.v1.engine.exceptions import EngineDeadError  # type: ignore[import-not-found]

from turnwise.agents.chat import ChatTemplate
from turnwise.agents.transformers_engine import load_tokenizer
from turnwise.agents.transformers_sampling import StopMatcher, decode
from turnwise.agents.vllm_process import ON_CPU, LoopThread, WeightLoader, save_weights, start_vllm, weights_folder
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Finish, Reply

Weights = Mapping[str, torch.Tensor] | str | Path
"""A state dict under the names of a saved checkpoint, or a folder of safetensors files."""


class VLLMEngine:
    """vLLM's continuous batching over one model: token ids in, token ids and their log-probabilities out.

    `load` makes one. It serves any event loop until `close`, or the end of its `with`, ends vLLM's process.

    A reply ends where the transformers engine would end it, and its log-probabilities are those of the distribution it
    was drawn from, temperature and top-p included. Greedy replies are that engine's, id for id, but for ties within
    the rounding. Sampled ones are not, since vLLM draws other random numbers from the same seed; they are the same
    each time, whatever else is running, within the same rounding.

    Prompts share what was computed before in whole blocks (of 32 tokens on a CPU, elsewhere as vLLM chooses).
    `prompt_tokens` counts the tokens of all prompts so far, `prefix_tokens_reused` those of them that were not computed
    again, and `cache_tokens` is how many fit into the memory for keys and values.
    """

    def __init__(
        self, llm: AsyncLLM, tokenizer: PreTrainedTokenizerBase, thread: LoopThread, *, name: str, version: int = 0
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.name = name
        self.version = version
        self.context = int(llm.model_config.max_model_len)
        self.vocabulary = int(llm.model_config.get_vocab_size())
        cache = llm.vllm_config.cache_config
        self.cache_tokens = int(cache.num_gpu_blocks * cache.block_size)
        self.prompt_tokens = 0
        self.prefix_tokens_reused = 0
        self.ends = _end_tokens(llm, tokenizer)
        self._added = tokenizer.get_added_vocab()
        self._matchers: dict[tuple[str, ...], StopMatcher] = {}
        self._numbers = count()
        self._llm = llm
        self._thread = thread
        # These belong to the thread.
        self._running = 0
        self._idle, self._open = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._open.set()
        self._one_update = asyncio.Lock()
        self._half_updated = False

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        cache_gigabytes: float = 1.0,
        context: int | None = None,
        dtype: torch.dtype | None = None,
        max_running: int = 64,
        version: int = 0,
    ) -> "VLLMEngine":
        """Starts vLLM on a checkpoint folder or a model of the Hugging Face hub, on the GPU where there is one.

        The engine takes the memory of its weights and `cache_gigabytes` (of 10^9 bytes) for keys and values, so that
        several engines can share a device. `context` is by default the model's own; `dtype` float32 on a CPU and the
        saved one elsewhere. vLLM's process imports the program that calls this, which must therefore do so below
        `if __name__ == "__main__":`.

        Raises `InputError` for a model that cannot be served, and where one prompt of `context` tokens would not fit.
        """
        if max_running < 1 or cache_gigabytes <= 0:
            raise InputError(
                "max_running must be at least 1 and cache_gigabytes above 0; got "
                f"max_running={max_running}, cache_gigabytes={cache_gigabytes}"
            )
        if isinstance(path, Path) or path.startswith((".", "/", "~")) or Path(path).is_dir():
            path = Path(path).expanduser()
            if not path.is_dir():
                raise InputError(f"a model must be a checkpoint folder or a hub id; there is no folder {path}")
        try:
            tokenizer = load_tokenizer(path)
            ChatTemplate(tokenizer)  # what is wrong with it is told before gigabytes of weights are read
            arguments = AsyncEngineArgs(
                model=str(path),
                skip_tokenizer_init=True,
                dtype=dtype or (torch.float32 if ON_CPU else "auto"),
                max_model_len=context,
                max_num_seqs=max_running,
                kv_cache_memory_bytes=int(cache_gigabytes * 1e9),
                gpu_memory_utilization=0.01,  # beside the line above, only the share that must be free at the start
                enable_prefix_caching=True,
                block_size=32 if ON_CPU else None,
                # A prompt that is computed in pieces rewinds its seed, which no random generator on a CPU can.
                enable_chunked_prefill=False if ON_CPU else None,
                enforce_eager=ON_CPU,
                use_tqdm_on_load=False,
                logprobs_mode="processed_logprobs",
                worker_extension_cls=f"{WeightLoader.__module__}.{WeightLoader.__qualname__}",
                disable_log_stats=True,
            )
            llm, thread = start_vllm(arguments)
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"cannot serve {path} with vLLM ({reason}): give the folder that save_pretrained wrote for a model and "
                "its tokenizer, or a hub id, and memory for its context; vLLM's own messages, if any, say more"
            ) from error
        return cls(llm, tokenizer, thread, name=str(path), version=version)

    def __enter__(self) -> "VLLMEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends vLLM's process, which frees its memory. Requests that still run are cancelled."""
        self._thread.close(self._shut_down)

    async def sample(
        self,
        prompt: Sequence[int],
        *,
        stops: tuple[str, ...],
        max_tokens: int,
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Reply:
        """Continues `prompt` until a closing tag, an end of sequence, `max_tokens`, or the end of the model's context.

        Raises ValueError for a prompt that is empty or fills the context, and `InputError` for one with tokens that
        the model does not know.
        """
        room = self.context - len(prompt)
        if not prompt or room < 1:
            raise ValueError(f"a prompt must have from 1 to {self.context - 1} tokens; this one has {len(prompt)}")
        if max_tokens < 1:
            raise ValueError(f"a turn must have room for at least 1 token; max_tokens is {max_tokens}")
        if max(prompt) >= self.vocabulary:
            # vLLM's process dies of it, with all that runs there.
            raise InputError(
                f"a token id must be below {self.vocabulary}, the model's vocabulary; a prompt has {max(prompt)}: call "
                "model.resize_token_embeddings(len(tokenizer)), save both, and train the model to use the added tokens"
            )
        tags = {self._added[stop] for stop in stops if stop in self._added}
        parameters = SamplingParams(
            max_tokens=min(max_tokens, room),
            temperature=temperature,
            top_p=top_p,
            seed=seed % 2**63,  # since vLLM reads -1 as no seed
            logprobs=0,  # besides the sampled token's
            stop_token_ids=sorted(self.ends | tags),
            ignore_eos=True,  # it is among those
            detokenize=False,
            # Other tags are looked for as the tokens come, and then the request is called off.
            output_kind=RequestOutputKind.DELTA if len(tags) < len(stops) else RequestOutputKind.FINAL_ONLY,
        )
        return await self._thread.wait(self._sample(tuple(prompt), self._matcher(stops), parameters))

    async def update(self, weights: Weights, *, version: int | None = None) -> None:
        """Replaces the weights in place, once all running replies have ended; those that come meanwhile wait.

        Every reply is thus sampled from one version, which it carries; the new one is by default the old one plus 1.
        What the cache holds of the old weights is forgotten. A state dict passes through a file in the temporary
        folder (TMPDIR), and must have every weight. Raises `InputError` for weights that are not this model's;
        whatever part of them was loaded by then, the engine serves again only after an update that succeeds.
        """
        if isinstance(weights, Mapping):
            with tempfile.TemporaryDirectory(prefix="turnwise-") as folder:
                await asyncio.to_thread(save_weights, weights, Path(folder))
                await self._thread.wait(self._update(Path(folder), version))
        else:
            await self._thread.wait(self._update(weights_folder(weights), version))

    def _shut_down(self) -> None:
        self._llm.shutdown()
        self._llm.engine_core.resources.ctx.destroy(linger=0)  # which vLLM leaves open

    async def _sample(self, prompt: tuple[int, ...], matcher: StopMatcher, parameters: SamplingParams) -> Reply:
        while not self._open.is_set():
            await self._open.wait()
        if self._half_updated:
            raise RuntimeError(f"the weights of {self.name} were replaced in part: update them again")
        version = self.version
        self._running += 1
        self._idle.clear()
        try:
            ids, log_probabilities, finish, stop = await self._until_its_end(prompt, matcher, parameters)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
        if not math.isfinite(sum(log_probabilities)):
            raise FloatingPointError("the model's logits are not finite numbers: its weights have diverged")
        return Reply(
            text=decode(self.tokenizer, ids[:-1] if finish == "end" else ids),
            token_count=len(ids),
            finish=finish,
            stop=stop,
            token_ids=tuple(ids),
            log_probabilities=tuple(log_probabilities),
            prompt_token_ids=prompt,
            tokenizer=self.template.fingerprint,
            model=self.name,
            version=version,
        )

    async def _until_its_end(
        self, prompt: tuple[int, ...], matcher: StopMatcher, parameters: SamplingParams
    ) -> tuple[list[int], list[float], Finish, str | None]:
        ids: list[int] = []
        log_probabilities: list[float] = []
        outputs = self._llm.generate({"prompt_token_ids": list(prompt)}, parameters, str(next(self._numbers)))
        async with aclosing(outputs):  # which calls the request off, where it has not ended
            async for output in outputs:
                if not ids:
                    self.prompt_tokens += len(prompt)
                    self.prefix_tokens_reused += output.num_cached_tokens or 0
                completion = output.outputs[0]
                for token, logs in zip(completion.token_ids, completion.logprobs, strict=True):
                    ids.append(token)
                    log_probabilities.append(logs[token].logprob)
                    if stop := matcher.match(ids):
                        return ids, log_probabilities, "stop", stop
                    if token in self.ends:
                        return ids, log_probabilities, "end", None
                    if len(ids) == parameters.max_tokens:
                        return ids, log_probabilities, "length", None
        raise RuntimeError(f"vLLM ended a reply after {len(ids)} tokens, without a reason")

    async def _update(self, folder: Path, version: int | None) -> None:
        async with self._one_update:
            self._open.clear()
            try:
                await self._idle.wait()
                self._half_updated = True
                missing = await self._load(folder)
                if missing:
                    raise InputError(f"an update must have every weight of the model; it lacks {', '.join(missing)}")
                if not await self._llm.reset_prefix_cache():
                    raise RuntimeError("vLLM's prefix cache holds on to the old weights: an aborted request still runs")
                self._half_updated = False
                self.version = self.version + 1 if version is None else version
            finally:
                self._open.set()

    async def _load(self, folder: Path) -> list[str]:
        try:
            missing = await self._llm.collective_rpc("load_safetensors", args=(str(folder),))
        except EngineDeadError:
            raise
        except Exception as error:  # vLLM's process wraps whatever happens there
            reason = " ".join(str(error).split())
            raise InputError(f"weights must fit the model {self.name}; they do not ({reason})") from error
        return list(missing[0])

    def _matcher(self, stops: tuple[str, ...]) -> StopMatcher:
        if stops not in self._matchers:
            self._matchers[stops] = StopMatcher(self.tokenizer, stops)
        return self._matchers[stops]


def _end_tokens(llm: AsyncLLM, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokenizer's end of sequence, and those of the model's generation settings (chat models often have two)."""
    configured = llm.model_config.try_get_generation_config().get("eos_token_id")
    more = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in (tokenizer.eos_token_id, *more) if token is not None)
