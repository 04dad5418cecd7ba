"""OpenRLHF's own Ray actor, which has vLLM in it, and samples as turnwise does."""

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import TypeVar

from vllm.v1.engine.exceptions import EngineDeadError  # type: ignore[import-not-found]

from turnwise.agents.engine import Request
from turnwise.agents.transformers_engine import load_tokenizer
from turnwise.agents.vllm_engine import VLLMEngine
from turnwise.agents.vllm_process import CPU_ENVIRONMENT, ON_CPU, LoopThread, WorkerExtension
from turnwise.rl.openrlhf.names import class_of
from turnwise.rl.openrlhf.sampling_actor import EngineDiedError, Sampled, SamplingActor, Served

import openrlhf.trainer.ray.vllm_engine as vllm_engine  # isort: skip  # after the names
import openrlhf.trainer.ray.vllm_worker_wrap as vllm_worker_wrap  # isort: skip

T = TypeVar("T")

# vLLM imports it by name.
WORKER = "turnwise.rl.openrlhf.vllm_without_cuda.WorkerWithoutCUDA" if ON_CPU else f"{__name__}.Worker"
ENVIRONMENT = CPU_ENVIRONMENT if ON_CPU else {}


class Worker(vllm_worker_wrap.WorkerWrap, WorkerExtension):  # type: ignore[misc]
    """What vLLM's workers can do beyond their own methods: they receive weights as OpenRLHF's do."""


class OwnLoop(LoopThread):
    """Stands for the thread of a `VLLMEngine` whose vLLM lives in the event loop that asks it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()

    async def wait(self, coroutine: Coroutine[None, None, T]) -> T:
        """What the coroutine returns."""
        return await coroutine


class VLLMActor(SamplingActor, class_of(vllm_engine.RolloutRayActor)):  # type: ignore[misc]
    """OpenRLHF's actor, which samples as `VLLMEngine` does.

    OpenRLHF's `generate` tells of a reply when vLLM has ended it, by its own reading of the text. Here it is turnwise
    that decides, with every token, whether a closing tag has come.
    """

    engine: VLLMEngine

    async def __init__(self, *, version: int, interruptible: bool, **settings: object) -> None:  # type: ignore[misc]
        """Ray awaits it."""
        await super().__init__(**settings)
        await self.llm.collective_rpc("end_with_parent")  # which is the actor
        model = str(settings["model"])
        tokenizer, loop = load_tokenizer(model), OwnLoop()
        self.engine = VLLMEngine(self.llm, tokenizer, loop, name=model, version=version, interruptible=interruptible)

    async def served(self) -> Served:
        """What it serves."""
        await _of_vllm(self.llm.check_health())
        engine, dtype = self.engine, self.llm.model_config.dtype
        return Served(engine.context, engine.ends, engine.vocabulary, engine.cache_tokens, dtype)

    async def reply(self, request: Request) -> Sampled:
        """Samples one turn; where this is cancelled, so it is in vLLM."""
        return await _of_vllm(super().reply(request))

    async def updated(self, version: int, *, running: bool) -> None:
        """Empties the prefix cache; with `running`, what running replies have computed is computed anew."""
        if not await _of_vllm(self.llm.reset_prefix_cache(reset_running_requests=running)):
            raise RuntimeError("vLLM's prefix cache holds on to the old weights: a request still runs")
        # What was sampled before a pause has come in by now, since vLLM answers in order.
        self.engine.version = version

    async def sleep(self, level: int = 1) -> None:
        """Lends its GPU's memory, until it wakes up."""
        await _of_vllm(super().sleep(level))

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Takes it back."""
        await _of_vllm(super().wake_up(tags))

    async def pause_generation(self) -> None:
        """Samples no token more, until it is told to go on."""
        await _of_vllm(super().pause_generation())

    async def resume_generation(self) -> None:
        """Goes on."""
        await _of_vllm(super().resume_generation())

    def shut_down(self) -> None:
        """Ends vLLM's own process, which does not always take the hint."""
        self.llm.shutdown(timeout=1.0)


async def _of_vllm(answer: Awaitable[T]) -> T:
    """What vLLM answers, whose own account of its end only those who have vLLM could read."""
    try:
        return await answer
    except EngineDeadError as error:
        raise EngineDiedError("vLLM's process ended") from error
