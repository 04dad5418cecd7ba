"""Samples from a policy that learns on OpenRLHF, through Ray actors with an engine in each."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from turnwise.agents.chat import ChatTemplate
from turnwise.agents.engine import Engine, Request, check_sampling
from turnwise.agents.transformers_engine import checkpoint, load_tokenizer
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Reply
from turnwise.rl.openrlhf.homes import BLOCK, Homes
from turnwise.rl.openrlhf.reservation import Share, reserve
from turnwise.rl.openrlhf.sampling_actor import EngineDiedError, Sampled, Served
from turnwise.rl.openrlhf.settings import OpenRLHFSettings

ENDS_WITHIN = 30.0  # seconds
# So many times in a row, without a reply in between, an engine is brought back to life.
LIVES = 3


class WeightSource(Protocol):
    """Where the weights of an engine come from: a learner."""

    def connect(self, actors: Sequence[ActorHandle]) -> None:
        """Gets to know the actors, which may be new."""

    def broadcast(self) -> int:
        """Sends them the weights, and returns once they are there: the version that was sent."""


class RolloutEngine(Engine):
    """Samples through one or several Ray actors with the same weights.

    `start` makes one. It is asked from one event loop at a time. `close`, or the end of its `with`, ends the actors.

    A dialogue goes on where it began, since its past is cached there; it begins where the fewest turns are running. A
    turn that is cancelled is called off in its actor, which no other turn notices.

    The turns of an actor that dies are asked of another one, with the same seeds; so no episode is lost by it. Where
    none is left, and before the next update, those that died are started anew and get their weights from `source`, at
    most `LIVES` times without a reply. Where there is no source, the turns fail with an EngineDiedError.
    """

    def __init__(
        self, launch: Callable[[int], ActorHandle], actors: Sequence[ActorHandle], served: Served, model: str | Path,
        *, by_vllm: bool, close: Callable[[], None], version: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(load_tokenizer(model), name=str(model), context=served.context, end_tokens=sorted(served.ends))
        self.ends, self.vocabulary, self.dtype = served.ends, served.vocabulary, served.dtype
        self.cache_tokens = served.cache_tokens * len(actors)
        self.version = version
        self.actors = list(actors)
        """Their Ray handles, for the learner that sends them its weights."""
        self.source: WeightSource | None = None
        self._launch, self._close, self._by_vllm = launch, close, by_vllm
        self._running: dict[ray.ObjectRef, tuple[int, float]] = {}
        self._dead = dict[int, str]()
        self._deaths = 0
        self._homes = Homes(self.cache_tokens // BLOCK)
        self._updated: asyncio.Event | None = None
        self._half_updated = False

    @classmethod
    def start(
        cls,
        model: str | Path,
        settings: OpenRLHFSettings,
        *,
        version: int = 0,
        interruptible: bool = False,
        place: PlacementGroup | None = None,
    ) -> "RolloutEngine":
        """Starts the actors on a checkpoint folder or a model of the Hugging Face hub. Ray must be running.

        They serve the weights in the precision in which they are trained. With `interruptible` an update may come in
        the midst of replies. In a `place` that is given the n-th actor takes its part of the n-th bundle.

        Raises `InputError` for a model that cannot be served, and for more actors than Ray has room for.
        """
        path = checkpoint(model)
        ChatTemplate(load_tokenizer(path))  # what is wrong with it is told before gigabytes of weights are read
        if settings.engine == "vllm":
            actor, arguments, environment = _vllm(path, settings, interruptible)
        else:
            actor, arguments, environment = _transformers(path, settings)
        close: Callable[[], None] = lambda: None  # noqa: E731
        if place is None:
            place, close = reserve(Share("actor", settings.actors, settings.gpus_per_actor))

        def launch(number: int) -> ActorHandle:
            options = ray.remote(actor).options(
                num_cpus=1,
                num_gpus=settings.gpus_per_actor,
                max_concurrency=100_000,  # it is the engine that queues them
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=number),
            )
            return options.remote(**arguments, version=version)

        try:
            started = [launch(number) for number in range(settings.actors)]
            served: list[Served] = ray.get([actor.served.remote() for actor in started])
        except (RayActorError, RayTaskError) as error:
            close()
            raise InputError(
                f"cannot serve {path} with {settings.engine} ({_reason(error)}): give the folder that save_pretrained "
                "wrote for a model and its tokenizer, or a hub id, and as many cache_gigabytes as its context needs; "
                "the engine's own messages, if any, say more"
            ) from error
        except BaseException:
            close()
            raise
        by_vllm = settings.engine == "vllm"
        return cls(launch, started, served[0], path, by_vllm=by_vllm, close=close, version=version)

    def __enter__(self) -> "RolloutEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the actors and the engines' processes, which frees their memory. Turns that still run fail."""
        alive = [self.actors[number] for number in self._alive()]
        self.source = None
        self._dead = dict.fromkeys(range(len(self.actors)), "the engine is closed")
        if ray.is_initialized():
            if alive:
                # Where Ray ends an actor, it is left to vLLM's process to notice.
                ray.wait([actor.shut_down.remote() for actor in alive], num_returns=len(alive), timeout=ENDS_WITHIN)
            self._close()
            self._close = lambda: None

    async def serve(self, request: Request) -> Reply:
        """Has an actor sample. Raises `InputError` for a prompt with tokens that the model does not know."""
        while True:
            while self._updated is not None:
                await self._updated.wait()
            self._check_weights()
            if len(self._dead) == len(self.actors):
                await self._restore()
                continue
            version, number = self.version, self._choose(request.prompt)
            try:
                sampled = await self._ask(number, request)
            except EngineDiedError:
                if self.source is None:
                    raise
                continue
            self._check_weights()
            self._deaths = 0
            self.prompt_tokens += sampled.prompt_tokens
            self.prefix_tokens_reused += sampled.prefix_tokens_reused
            if version == self.version:  # else what was cached is no more
                self._homes.keep(request.prompt + sampled.reply.token_ids, number)
            return replace(sampled.reply, model=self.name)

    def check_sampling(self, temperature: float, top_p: float) -> None:
        """As the engine of the actors does."""
        check_sampling(temperature, top_p, by_vllm=self._by_vllm)

    def waits_for(self) -> str:
        """In words, which actors have turns to answer, and for how long."""
        now, running = time.monotonic(), list(self._running.values())
        turns = Counter(number for number, _ in running)
        since = {number: now - min(at for other, at in running if other == number) for number in turns}
        told = (f"{turns[n]} turn(s) for actor {n} of {self.name}, up to {since[n]:.0f} s" for n in sorted(turns))
        return "; ".join(told)

    async def update(
        self, broadcast: Callable[[], object], *, version: int | None = None, interrupt: bool = False
    ) -> None:
        """Lets `broadcast` replace the weights of all actors, once all running replies have ended.

        It is called in a thread, and must not return before the weights are there; turns that come meanwhile wait.
        Every reply is thus sampled from one version, which it carries; the new one is by default the old one plus 1.
        With `interrupt` replies do not end first: they go on with the new weights, and tell the version of each token.
        What is cached of the old weights is forgotten. Where this fails, the engine serves again only after an update
        that succeeds.
        """
        async with self._closed():
            await self._all_alive()
            await (self._each("pause_generation") if interrupt else self._idle())
            new = self.version + 1 if version is None else version

            def send() -> int:
                broadcast()
                return new

            await self._replace_weights(send, interrupt)

    async def forget(self) -> None:
        """Empties what is cached, once all running replies have ended; turns that come meanwhile wait."""
        async with self._closed():
            await self._all_alive()
            if self._half_updated and self.source is not None:  # some were started anew
                await self._replace_weights(self.source.broadcast, False)
            else:
                await self._idle()
                await self._each("updated", version=self.version, running=False)
                self._homes.clear()

    @property
    def whole(self) -> bool:
        """Whether no actor is known to have died since all were alive."""
        return not self._dead

    async def sleep(self) -> None:
        """Lends the GPU's memory to others, until `wake`. Turns that come meanwhile wait forever: ask none.

        Who dies has no memory to lend, nor to take back: it is started anew before the next update.
        """
        await self._idle()
        await self._each_alive("sleep")

    async def wake(self) -> None:
        """Takes the memory back, with the weights that it had."""
        await self._each_alive("wake_up")

    async def restart(self) -> None:
        """Starts actors anew in the place of those that died. They have the weights that the engine was started on.

        Nothing is sampled before the learner was given the `actors` again, and an `update`.
        """
        for number in self._dead:
            ray.kill(self.actors[number])  # it holds its place as long as it lives, without its engine
        started = {number: self._launch(number) for number in self._dead}
        for number, actor in started.items():
            await self._answer(actor.served.remote(), number)
            self.actors[number] = actor
        if started:
            self._dead.clear()
            self._homes.clear()
            self._half_updated = True

    @asynccontextmanager
    async def _closed(self) -> AsyncIterator[None]:
        """Turns that come meanwhile wait."""
        while self._updated is not None:
            await self._updated.wait()
        self._updated = asyncio.Event()
        try:
            yield
        finally:
            self._updated.set()
            self._updated = None

    async def _restore(self) -> None:
        """Brings an engine back of which no actor is alive."""
        async with self._closed():
            if len(self._dead) < len(self.actors):
                return  # another turn has done it meanwhile
            if self.source is None:
                raise EngineDiedError(f"no actor of {self.name} is alive ({self._dead[0]}): call restart()")
            await self._revive(self.source)
            await self._replace_weights(self.source.broadcast, False)

    async def _all_alive(self) -> None:
        """Once they are. Else a dead one would fail the learner that sends to it."""
        while True:
            if self.source is not None and self._dead:
                await self._revive(self.source)
            try:
                return await self._each("served")
            except EngineDiedError:
                if self.source is None:
                    raise

    async def _revive(self, source: WeightSource) -> None:
        """Starts anew those that died, and makes them known to the learner."""
        self._deaths += 1
        if self._deaths > LIVES:
            raise InputError(
                f"an engine must live for at least a reply; that of {self.name} died {self._deaths} times in a row "
                f"({next(iter(self._dead.values()))}): give it fewer turns at once (max_running), or more memory"
            )
        await self._idle()
        await self.restart()
        await asyncio.to_thread(source.connect, self.actors)

    async def _replace_weights(self, broadcast: Callable[[], int], interrupt: bool) -> None:
        """`broadcast` says which version it has sent."""
        try:
            version = await asyncio.to_thread(broadcast)
            await self._each("updated", version=version, running=interrupt)
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
        self.version = version

    def _check_weights(self) -> None:
        if self._half_updated:
            raise RuntimeError(f"the weights of {self.name} are not all of one version: update them")

    def _choose(self, prompt: tuple[int, ...]) -> int:
        """The actor that has said the last of the prompt's turns, or the one that is asked for the fewest now."""
        alive = self._alive()
        home = self._homes.find(prompt)
        if home in alive:
            return home
        asked = [number for number, _ in list(self._running.values())]
        return min(alive, key=asked.count)

    async def _ask(self, number: int, request: Request) -> Sampled:
        reference = self.actors[number].reply.remote(request)
        self._running[reference] = number, time.monotonic()
        try:
            sampled: Sampled = await self._answer(reference, number)
        except asyncio.CancelledError:
            # Ray cancels the coroutine in the actor, which calls off this request of the engine's and no other. Let run
            # to its end it would hold up the next update for a whole reply that nobody reads.
            ray.cancel(reference)
            raise
        return sampled

    async def _answer(self, reference: ray.ObjectRef, number: int) -> Any:  # noqa: ANN401
        """What an actor returned, or what it raised, without Ray's account of where."""
        # A future of its own, which is not cancelled where the turn is: the actor may be at it still. The callback
        # comes in a thread of Ray's: whoever goes through what is running does so on a copy.
        reference.future().add_done_callback(lambda _: self._running.pop(reference, None))
        try:
            return await asyncio.wrap_future(reference.future())
        except RayTaskError as error:
            if not isinstance(error.cause, EngineDiedError):
                raise error.cause from None
            reason = str(error.cause)
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

    async def _each_alive(self, method: str) -> None:
        """Has those actors do something that are alive, and live on."""

        async def ask(number: int) -> None:
            with suppress(EngineDiedError):
                await self._answer(getattr(self.actors[number], method).remote(), number)

        await asyncio.gather(*map(ask, self._alive()))

    def _alive(self) -> list[int]:
        return [number for number in range(len(self.actors)) if number not in self._dead]

    async def _idle(self) -> None:
        """Waits until no actor is at work, be it at a turn that was called off."""
        running = [asyncio.wrap_future(reference.future()) for reference in list(self._running)]
        await asyncio.gather(*running, return_exceptions=True)


# Each imports what only it needs.


def _vllm(
    model: str | Path, settings: OpenRLHFSettings, interruptible: bool
) -> tuple[type, dict[str, object], dict[str, str]]:
    from turnwise.agents.vllm_process import ON_CPU, vllm_settings
    from turnwise.rl.openrlhf.vllm_actor import ENVIRONMENT, WORKER, VLLMActor

    arguments: dict[str, object] = {
        **vllm_settings(
            model,
            cache_gigabytes=settings.cache_gigabytes,
            context=settings.context,
            dtype=settings.dtype,
            max_running=settings.max_running,
        ),
        "worker_extension_cls": WORKER,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "interruptible": interruptible,
        "num_gpus": settings.gpus_per_actor,
    }
    if settings.colocated and not ON_CPU:  # where vLLM takes no notice of being told to sleep
        arguments["enable_sleep_mode"] = True
    return VLLMActor, arguments, ENVIRONMENT


def _transformers(model: str | Path, settings: OpenRLHFSettings) -> tuple[type, dict[str, object], dict[str, str]]:
    from turnwise.rl.openrlhf.transformers_actor import TransformersActor

    arguments: dict[str, object] = {
        "model": model,
        "device": "cuda" if settings.gpus_per_actor else "cpu",
        "dtype": settings.dtype,
        "max_running": settings.max_running,
        "context": settings.context,
    }
    return TransformersActor, arguments, {}


def _reason(error: Exception) -> str:
    """The last line of what Ray tells at length."""
    return str(error).strip().splitlines()[-1].strip()
