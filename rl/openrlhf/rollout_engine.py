"""Samples from a policy that learns on OpenRLHF, through OpenRLHF's own Ray actors, which have vLLM in them."""

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from vllm.v1.engine.exceptions import EngineDeadError  # type: ignore[import-not-found]

from turnwise.agents.chat import ChatTemplate
from turnwise.agents.engine import Engine, check_sampling
from turnwise.agents.transformers_engine import checkpoint, load_tokenizer
from turnwise.agents.vllm_engine import VLLMEngine
from turnwise.agents.vllm_process import CPU_ENVIRONMENT, ON_CPU, LoopThread, WorkerExtension, vllm_settings
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Reply
from turnwise.rl.openrlhf.names import class_of

import openrlhf.trainer.ray.vllm_engine as vllm_engine  # isort: skip  # after the names
import openrlhf.trainer.ray.vllm_worker_wrap as vllm_worker_wrap  # isort: skip

T = TypeVar("T")

PLACED_WITHIN, ENDS_WITHIN = 60.0, 30.0  # seconds

# vLLM imports it by name.
WORKER = "turnwise.rl.openrlhf.vllm_without_cuda.WorkerWithoutCUDA" if ON_CPU else f"{__name__}.Worker"
BLOCK = 32
"""So many tokens are looked up at a time, to find where a dialogue was begun."""


class EngineDiedError(RuntimeError):
    """What was asked of an actor that is no more."""


@dataclass(frozen=True, slots=True)
class Request:
    """A turn to be sampled, as `Engine.sample` is asked for it."""

    prompt: tuple[int, ...]
    stops: tuple[str, ...]
    max_tokens: int
    seed: int
    temperature: float
    top_p: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """A reply, and what of the two counts of `Engine` came up since the one before."""

    reply: Reply
    prompt_tokens: int
    prefix_tokens_reused: int


@dataclass(frozen=True, slots=True)
class Served:
    """The model as vLLM serves it."""

    context: int
    ends: frozenset[int]
    vocabulary: int
    cache_tokens: int
    dtype: torch.dtype


class Worker(vllm_worker_wrap.WorkerWrap, WorkerExtension):  # type: ignore[misc]
    """What vLLM's workers can do beyond their own methods: they receive weights as OpenRLHF's do."""


class OwnLoop(LoopThread):
    """Stands for the thread of a `VLLMEngine` whose vLLM lives in the event loop that asks it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()

    async def wait(self, coroutine: Coroutine[None, None, T]) -> T:
        """What the coroutine returns."""
        return await coroutine


class RolloutActor(class_of(vllm_engine.RolloutRayActor)):  # type: ignore[misc]
    """OpenRLHF's actor, which samples as `VLLMEngine` does.

    OpenRLHF's `generate` tells of a reply when vLLM has ended it, by its own reading of the text. Here it is turnwise
    that decides, with every token, whether a closing tag has come.
    """

    async def __init__(self, **settings: object) -> None:  # type: ignore[misc]  # Ray awaits it
        await super().__init__(**settings)
        await self.llm.collective_rpc("end_with_parent")  # which is the actor
        model = str(settings["model"])
        self._engine = VLLMEngine(self.llm, load_tokenizer(model), OwnLoop(), name=model)
        self._counted = (0, 0)

    def served(self) -> Served:
        """What it serves."""
        engine, dtype = self._engine, self.llm.model_config.dtype
        return Served(engine.context, engine.ends, engine.vocabulary, engine.cache_tokens, dtype)

    async def sample(self, request: Request) -> Sampled:
        """Samples one turn; where this is cancelled, so it is in vLLM."""
        reply = await self._engine.sample(
            request.prompt,
            stops=request.stops,
            max_tokens=request.max_tokens,
            seed=request.seed,
            temperature=request.temperature,
            top_p=request.top_p,
        )
        counts = self._engine.prompt_tokens, self._engine.prefix_tokens_reused
        prompt, reused = (now - before for now, before in zip(counts, self._counted, strict=True))
        self._counted = counts
        return Sampled(reply, prompt, reused)

    async def forget(self, *, running: bool) -> None:
        """Empties the prefix cache; with `running`, what running replies have computed is computed anew."""
        if not await self.llm.reset_prefix_cache(reset_running_requests=running):
            raise RuntimeError("vLLM's prefix cache holds on to the old weights: a request still runs")

    def shut_down(self) -> None:
        """Ends vLLM's own process, which does not always take the hint."""
        self.llm.shutdown(timeout=1.0)


class RolloutEngine(Engine):
    """Samples through one or several of OpenRLHF's vLLM actors with the same weights, as `VLLMEngine` does.

    `start` makes one. It is asked from one event loop at a time. `close`, or the end of its `with`, ends the actors.

    A dialogue goes on where it began, since its past is cached there; it begins where the fewest turns are running. A
    turn that is cancelled is called off in vLLM, which no other turn notices.

    An actor that dies fails its turns with an `EngineDiedError`. The others take over the dialogues, until `restart`.
    """

    def __init__(
        self, launch: Callable[[int], ActorHandle], actors: Sequence[ActorHandle], served: Served, model: str | Path,
        *, close: Callable[[], None], version: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(load_tokenizer(model), name=str(model), context=served.context, end_tokens=sorted(served.ends))
        self.ends, self.vocabulary, self.dtype = served.ends, served.vocabulary, served.dtype
        self.cache_tokens = served.cache_tokens * len(actors)
        self.version = version
        self.actors = list(actors)
        """Their Ray handles, for the learner that sends them its weights."""
        self._launch, self._close = launch, close
        self._running: dict[ray.ObjectRef, int] = {}
        self._dead = dict[int, str]()
        self._homes = Homes(self.cache_tokens // BLOCK)
        self._updated: asyncio.Event | None = None
        self._half_updated = False

    @classmethod
    def start(
        cls,
        model: str | Path,
        *,
        actors: int = 1,
        gpus_per_actor: float = 1.0,
        cache_gigabytes: float = 1.0,
        context: int | None = None,
        dtype: torch.dtype | None = None,
        max_running: int = 64,
        version: int = 0,
    ) -> "RolloutEngine":
        """Starts the actors on a checkpoint folder or a model of the Hugging Face hub. Ray must be running.

        Each takes `gpus_per_actor` of a GPU (0: a CPU), and the memory of its weights and `cache_gigabytes` (of 10^9
        bytes) for keys and values; each samples up to `max_running` turns at once. `context` is by default the model's
        own; `dtype` must be that in which the learner sends the weights: by default float32 on a CPU and the saved one
        elsewhere.

        Raises `InputError` for a model that cannot be served, and for more actors than Ray has room for.
        """
        path = checkpoint(model)
        settings = vllm_settings(
            path, cache_gigabytes=cache_gigabytes, context=context, dtype=dtype, max_running=max_running
        )
        ChatTemplate(load_tokenizer(path))  # what is wrong with it is told before gigabytes of weights are read
        settings |= {"worker_extension_cls": WORKER, "skip_tokenizer_init": True, "disable_log_stats": True}
        place = _place(actors, gpus_per_actor)
        close = functools.partial(remove_placement_group, place)

        def launch(number: int) -> ActorHandle:
            options = ray.remote(RolloutActor).options(
                num_cpus=1,
                num_gpus=gpus_per_actor,
                max_concurrency=100_000,  # it is vLLM that queues them
                runtime_env={"env_vars": CPU_ENVIRONMENT if ON_CPU else {}},
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=number),
            )
            return options.remote(**settings, num_gpus=gpus_per_actor)

        try:
            started = [launch(number) for number in range(actors)]
            served: list[Served] = ray.get([actor.served.remote() for actor in started])
        except (RayActorError, RayTaskError) as error:
            close()
            raise InputError(
                f"cannot serve {path} with vLLM ({_reason(error)}): give the folder that save_pretrained wrote for a "
                "model and its tokenizer, or a hub id, and as many cache_gigabytes as its context needs; vLLM's own "
                "messages, if any, say more"
            ) from error
        except BaseException:
            close()
            raise
        return cls(launch, started, served[0], path, close=close, version=version)

    def __enter__(self) -> "RolloutEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the actors and vLLM's processes, which frees their memory. Turns that still run fail."""
        alive = [actor for number, actor in enumerate(self.actors) if number not in self._dead]
        self._dead = dict.fromkeys(range(len(self.actors)), "the engine is closed")
        if alive and ray.is_initialized():
            # Where Ray ends an actor, it is left to vLLM's process to notice.
            ray.wait([actor.shut_down.remote() for actor in alive], num_returns=len(alive), timeout=ENDS_WITHIN)
            self._close()

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
        """Has an actor continue `prompt`. Raises `InputError` also for one with tokens that the model does not know."""
        request = Request(tuple(prompt), stops, max_tokens, seed, temperature, top_p)
        while self._updated is not None:
            await self._updated.wait()
        self._check_weights()
        version, number = self.version, self._choose(request.prompt)
        sampled = await self._ask(number, request)
        self._check_weights()
        self.prompt_tokens += sampled.prompt_tokens
        self.prefix_tokens_reused += sampled.prefix_tokens_reused
        if version == self.version:  # else what was cached is no more
            self._homes.keep(request.prompt + sampled.reply.token_ids, number)
        return replace(sampled.reply, model=self.name, version=version)

    def check_sampling(self, temperature: float, top_p: float) -> None:
        """As `VLLMEngine` does."""
        check_sampling(temperature, top_p, by_vllm=True)

    async def update(
        self, broadcast: Callable[[], object], *, version: int | None = None, interrupt: bool = False
    ) -> None:
        """Lets `broadcast` replace the weights of all actors, once all running replies have ended.

        It is called in a thread, and must not return before the weights are there; turns that come meanwhile wait.
        Every reply is thus sampled from one version, which it carries; the new one is by default the old one plus 1.
        With `interrupt` replies do not end first: they go on with the new weights, and carry the version with which
        they began. What is cached of the old weights is forgotten. Where this fails, the engine serves again only after
        an update that succeeds.
        """
        while self._updated is not None:
            await self._updated.wait()
        self._updated = asyncio.Event()
        try:
            await self._each("served")  # else a dead one would fail the learner
            await (self._each("pause_generation") if interrupt else self._idle())
            await self._replace_weights(broadcast, interrupt)
            self.version = self.version + 1 if version is None else version
        finally:
            self._updated.set()
            self._updated = None

    async def restart(self) -> None:
        """Starts actors anew in the place of those that died. They have the weights that the engine was started on.

        Nothing is sampled before the learner was given the `actors` again, and an `update`.
        """
        for number in self._dead:
            ray.kill(self.actors[number])  # it holds its place as long as it lives, without vLLM
        started = {number: self._launch(number) for number in self._dead}
        for number, actor in started.items():
            await self._answer(actor.served.remote(), number)
            self.actors[number] = actor
        if started:
            self._dead.clear()
            self._homes.clear()
            self._half_updated = True

    async def _replace_weights(self, broadcast: Callable[[], object], interrupt: bool) -> None:
        try:
            await asyncio.to_thread(broadcast)
            await self._each("forget", running=interrupt)
            if interrupt:
                await self._each("resume_generation")
        except BaseException:
            self._half_updated = True
            if interrupt:  # so that what still runs comes to an end, and is refused
                for actor in self.actors:
                    actor.resume_generation.remote()
            raise
        self._homes.clear()
        self._half_updated = False

    def _check_weights(self) -> None:
        if self._half_updated:
            raise RuntimeError(f"the weights of {self.name} are not all of one version: update them")

    def _choose(self, prompt: tuple[int, ...]) -> int:
        """The actor that has said the last of the prompt's turns, or the one that is asked for the fewest now."""
        alive = [number for number in range(len(self.actors)) if number not in self._dead]
        if not alive:
            raise EngineDiedError(f"no actor of {self.name} is alive ({self._dead[0]}): call restart()")
        home = self._homes.find(prompt)
        if home in alive:
            return home
        asked = list(self._running.values())
        return min(alive, key=asked.count)

    async def _ask(self, number: int, request: Request) -> Sampled:
        reference = self.actors[number].sample.remote(request)
        self._running[reference] = number
        try:
            sampled: Sampled = await self._answer(reference, number)
        except asyncio.CancelledError:
            # Ray cancels the coroutine in the actor, which calls off this request of vLLM's and no other. Let run to
            # its end it would hold up the next update for a whole reply that nobody reads.
            ray.cancel(reference)
            raise
        return sampled

    async def _answer(self, reference: ray.ObjectRef, number: int) -> Any:  # noqa: ANN401
        """What an actor returned, or what it raised, without Ray's account of where."""
        # A future of its own, which is not cancelled where the turn is: the actor may be at it still.
        reference.future().add_done_callback(lambda _: self._running.pop(reference, None))
        try:
            return await asyncio.wrap_future(reference.future())
        except RayTaskError as error:
            if not isinstance(error.cause, EngineDeadError):
                raise error.cause from None
            reason = "vLLM's process ended"
        except RayActorError as error:
            reason = _reason(error).split(". ")[0]
        self._dead.setdefault(number, reason)
        raise EngineDiedError(
            f"actor {number} of {self.name} died ({self._dead[number]}): its turns are lost; call restart()"
        )

    async def _each(self, method: str, **arguments: object) -> None:
        """Has all actors do something."""
        calls = [getattr(actor, method).remote(**arguments) for actor in self.actors]
        await asyncio.gather(*(self._answer(call, number) for number, call in enumerate(calls)))

    async def _idle(self) -> None:
        """Waits until no actor is at work, be it at a turn that was called off."""
        running = [asyncio.wrap_future(reference.future()) for reference in self._running]
        await asyncio.gather(*running, return_exceptions=True)


class Homes:
    """Which actor knows how a prompt begins, by the tokens of that beginning; the latest `size` of them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._homes = dict[int, int]()

    def find(self, prompt: Sequence[int]) -> int | None:
        """The actor of the longest beginning that was kept."""
        found = None
        for key in beginnings(prompt):
            found = self._homes.get(key, found)
        return found

    def keep(self, sequence: Sequence[int], actor: int) -> None:
        """Remembers the end of a turn, and not its beginnings: a beginning may be that of all dialogues."""
        for key in (*beginnings(sequence),)[-1:]:
            self._homes.pop(key, None)
            self._homes[key] = actor
        if len(self._homes) > self._size:
            del self._homes[next(iter(self._homes))]

    def clear(self) -> None:
        """Forgets all."""
        self._homes.clear()


def beginnings(tokens: Sequence[int]) -> Iterator[int]:
    """A key for each beginning of whole blocks, from the shortest to the longest."""
    key = 0
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        key = hash((key, *tokens[end - BLOCK : end]))
        yield key


def _place(actors: int, gpus_per_actor: float) -> PlacementGroup:
    """Room for the actors. Raises `InputError` where Ray has too little."""
    if actors < 1 or not 0 <= gpus_per_actor <= 1:
        raise InputError(
            f"actors must be at least 1 and gpus_per_actor within [0, 1]; got actors={actors}, "
            f"gpus_per_actor={gpus_per_actor}"
        )
    if not ray.is_initialized():
        raise InputError("OpenRLHF's actors need Ray, which is not running: call ray.init() first")
    bundle = {"CPU": 1.0} | ({"GPU": gpus_per_actor} if gpus_per_actor else {})
    there = ray.cluster_resources()
    for name, amount in bundle.items():
        if actors * amount > there.get(name, 0.0):
            raise InputError(
                f"{actors} actor(s) need {actors * amount:g} {name}(s), and Ray has {there.get(name, 0.0):g}: ask for "
                "fewer actors, or set gpus_per_actor"
            )
    place = placement_group([bundle] * actors, strategy="PACK")
    if not place.wait(timeout_seconds=PLACED_WITHIN):
        remove_placement_group(place)
        raise InputError(f"{actors} actor(s) need {bundle} each, which others of this Ray have taken")
    return place


def _reason(error: Exception) -> str:
    """The last line of what Ray tells at length."""
    return str(error).strip().splitlines()[-1].strip()
