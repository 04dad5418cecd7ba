"""Samples from a model that vLLM serves, in a process that this one starts, feeds and ends."""

import asyncio
import math
import os
import tempfile
from collections.abc import Mapping
from contextlib import aclosing
from itertools import count
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

# Before vLLM is imported: else it says on stdout whatever it does.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import SamplingParams  # type: ignore[import-not-found]
from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found]
from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]
from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found]
from vllm.v1.engine.exceptions import EngineDeadError  # type: ignore[import-not-found]

from turnwise.agents.chat import ChatTemplate
from turnwise.agents.engine import Engine, PartialReply, Request, check_sampling
from turnwise.agents.transformers_engine import checkpoint, load_tokenizer
from turnwise.agents.vllm_process import LoopThread, save_weights, start_vllm, vllm_settings, weights_folder
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Reply

Weights = Mapping[str, torch.Tensor] | str | Path
"""A state dict under the names of a saved checkpoint, or a folder of safetensors files."""


class VLLMEngine(Engine):
    """vLLM's continuous batching over one model: token ids in, token ids and their log-probabilities out.

    `load` makes one. It serves any event loop until `close`, or the end of its `with`, ends vLLM's process.

    A reply ends where the transformers engine would end it, and its log-probabilities are those of the distribution it
    was drawn from, temperature and top-p included. Greedy replies are that engine's, id for id, but for ties within
    the rounding. Sampled ones are not, since vLLM draws other random numbers from the same seed; they are the same
    each time, whatever else is running, within the same rounding.

    Prompts share what was computed before in whole blocks (of 32 tokens on a CPU, elsewhere as vLLM chooses).
    `cache_tokens` is how many fit into the memory for keys and values.

    `interruptible` is for who replaces vLLM's weights, and then sets `version`, while replies are running: each token
    is noticed as it comes, so that it is known to which version it belongs.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        tokenizer: PreTrainedTokenizerBase,
        thread: LoopThread,
        *,
        name: str,
        version: int = 0,
        interruptible: bool = False,
    ) -> None:
        super().__init__(
            tokenizer,
            name=name,
            context=int(llm.model_config.max_model_len),
            end_tokens=llm.model_config.try_get_generation_config().get("eos_token_id"),
        )
        self.version = version
        self.vocabulary = int(llm.model_config.get_vocab_size())
        # vLLM refuses to be told of an end that it cannot sample.
        self.ends = frozenset(token for token in self.ends if token < self.vocabulary)
        cache = llm.vllm_config.cache_config
        self.cache_tokens = int(cache.num_gpu_blocks * cache.block_size)
        self._added = tokenizer.get_added_vocab()
        self._numbers = count()
        self._llm = llm
        self._interruptible = interruptible
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
        path = checkpoint(path)
        try:
            tokenizer = load_tokenizer(path)
            ChatTemplate(tokenizer)  # what is wrong with it is told before gigabytes of weights are read
            settings = vllm_settings(
                path, cache_gigabytes=cache_gigabytes, context=context, dtype=dtype, max_running=max_running
            )
            arguments = AsyncEngineArgs(**settings, skip_tokenizer_init=True, disable_log_stats=True)
            llm, thread = start_vllm(arguments)
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"cannot serve {path} with vLLM ({reason}): give the folder that save_pretrained wrote for a model and "
                "its tokenizer, or a hub id, and as many cache_gigabytes as its context needs; vLLM's own messages, if "
                "any, say more"
            ) from error
        return cls(llm, tokenizer, thread, name=str(path), version=version)

    def __enter__(self) -> "VLLMEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends vLLM's process, which frees its memory. Requests that still run are cancelled."""
        self._thread.close(self._shut_down)

    async def serve(self, request: Request) -> Reply:
        """Has vLLM sample. Raises `InputError` for a prompt with tokens that the model does not know."""
        if max(request.prompt) >= self.vocabulary:
            # vLLM's process dies of it, with all that runs there.
            raise InputError(
                f"a token id must be below {self.vocabulary}, the model's vocabulary; a prompt has "
                f"{max(request.prompt)}: call model.resize_token_embeddings(len(tokenizer)), save both, and train the "
                "model to use the added tokens"
            )
        tags = {self._added[stop] for stop in request.stops if stop in self._added}
        by_token = self._interruptible or len(tags) < len(request.stops)
        parameters = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed % 2**63,  # since vLLM reads -1 as no seed
            logprobs=0,  # besides the sampled token's
            stop_token_ids=sorted(self.ends | tags),
            ignore_eos=True,  # it is among those
            detokenize=False,
            # Other tags are looked for as the tokens come, and then the request is called off.
            output_kind=RequestOutputKind.DELTA if by_token else RequestOutputKind.FINAL_ONLY,
        )
        said = PartialReply(matcher=self._matcher(request.stops), ends=self.ends, budget=request.max_tokens)
        return await self._thread.wait(self._sample(request.prompt, said, parameters))

    def check_sampling(self, temperature: float, top_p: float) -> None:
        """Raises `InputError` for what vLLM would not sample at."""
        check_sampling(temperature, top_p, by_vllm=True)

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
        resources = self._llm.engine_core.resources
        for process in resources.engine_manager.processes:
            process.join()  # killed at the latest by now, and soon ended
        resources.ctx.destroy(linger=0)  # which vLLM leaves open

    async def _sample(self, prompt: tuple[int, ...], said: PartialReply, parameters: SamplingParams) -> Reply:
        while not self._open.is_set():
            await self._open.wait()
        if self._half_updated:
            raise RuntimeError(f"the weights of {self.name} were replaced in part: update them again")
        version = self.version
        self._running += 1
        self._idle.clear()
        try:
            await self._until_its_end(prompt, said, parameters)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
        if not math.isfinite(sum(said.log_probabilities)):
            raise FloatingPointError("the model's logits are not finite numbers: its weights have diverged")
        return self._reply(prompt, said, version)

    async def _until_its_end(self, prompt: tuple[int, ...], said: PartialReply, parameters: SamplingParams) -> None:
        outputs = self._llm.generate({"prompt_token_ids": list(prompt)}, parameters, str(next(self._numbers)))
        async with aclosing(outputs):  # which calls the request off, where it has not ended
            async for output in outputs:
                if not said.ids:
                    self.prompt_tokens += len(prompt)
                    self.prefix_tokens_reused += output.num_cached_tokens or 0
                completion = output.outputs[0]
                for token, logs in zip(completion.token_ids, completion.logprobs, strict=True):
                    said.take(token, logs[token].logprob)
                    said.versions.append(self.version)
                    if said.finish:
                        return
        raise RuntimeError(f"vLLM ended a reply after {len(said.ids)} tokens, without a reason")

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
