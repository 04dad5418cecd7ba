"""OpenRLHF's vLLM actors sample by the contract of all engines, and what they sample from follows a learner."""

import asyncio
import inspect
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

pytest.importorskip("deepspeed", reason="needs OpenRLHF: make openrlhf")
pytest.importorskip("vllm", reason="needs OpenRLHF: make openrlhf")
if torch.cuda.is_available():
    pytest.skip("its actors and its learner are to be on the CPU", allow_module_level=True)

import psutil
import ray
from ray.actor import ActorHandle

from turnwise.agents.contract import CHECKS, Check, Subject, question
from turnwise.agents.engine import Engine, EngineAgent
from turnwise.agents.tiny import LONG, SHORT
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.agents.transformers_engine import load_tokenizer
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.transcript import Reply
from turnwise.protocols.long_short import LongShort
from turnwise.rl.advantage import Sample
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.openrlhf.homes import BLOCK, Homes
from turnwise.rl.openrlhf.learner import OpenRLHFLearner
from turnwise.rl.openrlhf.policy import OpenRLHFPolicy
from turnwise.rl.openrlhf.rollout_engine import LIVES, RolloutEngine, _transformers
from turnwise.rl.openrlhf.sampling_actor import EngineDiedError, Served
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.openrlhf.vllm_actor import VLLMActor, Worker
from turnwise.rl.openrlhf.vllm_without_cuda import group_of_processes
from turnwise.rl.rollout import play

# What Ray says when it starts, and the files and processes that it leaves to the garbage collector when it ends; and
# what vLLM imports of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
    pytest.mark.filterwarnings("ignore:(unclosed file.*/dev/null|subprocess \\d+ is still running):ResourceWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

# The workers of Ray have the class below by value: they cannot import a test.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        "local", num_cpus=8, num_gpus=0, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000
    )
    yield
    ray.shutdown()


ON_CPU = OpenRLHFSettings(gpus_per_rank=0, gpus_per_actor=0, precision="fp32", cache_gigabytes=0.064)


def start(model: Path, *, actors: int = 2, version: int = 0, interruptible: bool = False) -> RolloutEngine:
    settings = ON_CPU.model_copy(update={"actors": actors})
    return RolloutEngine.start(model, settings, version=version, interruptible=interruptible)


@pytest.fixture(scope="module")
def long(cluster: None) -> Iterator[RolloutEngine]:
    """Its weights stay what they are."""
    with start(LONG) as engine:
        yield engine


@pytest.fixture(scope="module")
def tied(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose output layer is its embedding, which is sent once and meant twice."""
    folder = tmp_path_factory.mktemp("tied")
    config = AutoConfig.from_pretrained(LONG)
    config.tie_word_embeddings = True
    state = {name: weight for name, weight in original().items() if not name.startswith("lm_head")}
    model = AutoModelForCausalLM.from_config(config)
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing == ["lm_head.weight"]
    model.save_pretrained(folder)
    for file in LONG.glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(LONG / "chat_template.jinja", folder)
    return folder


@pytest.fixture(scope="module")
def changing(tied: Path) -> Iterator[RolloutEngine]:
    """Each test sends it weights of its own first."""
    with start(tied, interruptible=True) as engine:
        yield engine


def original() -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(LONG, dtype=torch.float32)
    return {name: weight.detach() for name, weight in model.state_dict().items()}


def transformers(model: Path, weights: Mapping[str, torch.Tensor] | None = None) -> TransformersEngine:
    engine = TransformersEngine.load(model, dtype=torch.float32)
    if weights is not None:
        engine.model.load_state_dict(dict(weights))
    return engine


def send(engine: RolloutEngine, weights: Mapping[str, torch.Tensor]) -> None:
    """By the calls that OpenRLHF's trainer makes, from this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = len(engine.actors) + 1
    joined = [
        actor.init_process_group.remote("127.0.0.1", port, 1 + number, world, "group", backend="gloo", use_ray=False)
        for number, actor in enumerate(engine.actors)
    ]
    group = group_of_processes("127.0.0.1", port, 0, world, torch.device("cpu"))
    ray.get(joined)
    for name, weight in weights.items():
        received = [actor.update_weight.remote(name, weight.dtype, weight.shape) for actor in engine.actors]
        group.broadcast(weight, 0)
        ray.get(received)


def variant(model: Path, seed: int) -> dict[str, torch.Tensor]:
    """A model's weights, each as it is sent, with something added to them."""
    torch.manual_seed(seed)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return {name: weight + 0.02 * torch.randn_like(weight) for name, weight in loaded.named_parameters()}


async def greedy(engine: Engine, *, count: int = 12, max_tokens: int = 40) -> list[Reply]:
    """Prompts of more than one block, which many of them share."""
    turns = [question(number, max_tokens=max_tokens) for number in range(count)]
    agent = EngineAgent(engine, temperature=0)
    return list(await asyncio.gather(*(agent.reply(turn, 0) for turn in turns)))


def endless(engine: RolloutEngine, number: int = 1) -> "asyncio.Task[Reply]":
    """A turn that goes on up to the context."""
    return asyncio.create_task(
        engine.sample([30 + number] * 40, stops=("never",), max_tokens=900, seed=0, temperature=0)
    )


async def unfinished(engine: RolloutEngine) -> int:
    return sum(await asyncio.gather(*(actor.get_num_unfinished_requests.remote() for actor in engine.actors)))


async def until(engine: RolloutEngine, count: int) -> None:
    while await unfinished(engine) != count:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def halt(engine: RolloutEngine) -> None:
    """Until `go_on`, the engines take turns and compute nothing: what happens meanwhile meets each of them running."""
    await engine._each("pause_generation")


async def go_on(engine: RolloutEngine, of: slice = slice(None)) -> None:
    await asyncio.gather(*(actor.resume_generation.remote() for actor in engine.actors[of]))


def assert_alike(replies: Sequence[Reply], expected: Sequence[Reply]) -> None:
    """Equal in all but the last bits of the log-probabilities."""
    for reply, other in zip(replies, expected, strict=True):
        assert (reply.prompt_token_ids, reply.token_ids) == (other.prompt_token_ids, other.token_ids)
        assert reply.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-3)
        assert (reply.text, reply.finish, reply.stop) == (other.text, other.finish, other.stop)
        assert (reply.token_count, reply.tokenizer) == (other.token_count, other.tokenizer)


def assert_serves(engine: RolloutEngine, model: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """All actors greedily say what transformers says with these weights, the first time and from the cache."""
    expected = asyncio.run(greedy(transformers(model, weights)))
    for _ in range(2):
        replies = asyncio.run(greedy(engine))
        assert_alike(replies, expected)
        assert {reply.version for reply in replies} == {engine.version}


# What turnwise rests on in OpenRLHF's actor


def test_the_actor_and_the_worker_have_what_is_called_on_them() -> None:
    actor, worker = VLLMActor.__bases__[1], Worker.__bases__[0]
    expected = {
        actor.init_process_group: "master_address master_port rank_offset world_size group_name backend use_ray",
        actor.update_weight: "name dtype shape empty_cache",
        actor.pause_generation: "",
        actor.resume_generation: "",
        actor.sleep: "level",
        actor.wake_up: "tags",
        worker.update_weight: "name dtype shape empty_cache",
        worker.init_process_group: "master_address master_port rank_offset world_size group_name backend use_ray",
    }
    for method, parameters in expected.items():
        found = [name for name in inspect.signature(method).parameters if name not in ("self", "_ray_trace_ctx")]
        assert found == parameters.split(), method
    source = inspect.getsource(actor.__init__)
    assert "self.llm = vllm.AsyncLLMEngine.from_engine_args(engine_args)" in source
    assert 'kwargs.pop("num_gpus")' in source


# Sampling


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_actors_keep_the_contract(check: Check, long: RolloutEngine, model: PreTrainedModel) -> None:
    def agent(temperature: float, top_p: float) -> EngineAgent:
        return EngineAgent(long, temperature=temperature, top_p=top_p)

    asyncio.run(check(Subject(agent, model, load_tokenizer(LONG), 1024)))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(LONG, dtype=torch.float32)


def test_two_engines_play_greedily_what_transformers_plays(long: RolloutEngine) -> None:
    with MathGrader() as grader, start(SHORT, actors=1) as short:
        environment = arithmetic(grader, problem_set="mixed", count=48, seed=11)
        team = {"long": EngineAgent(long, temperature=0), "short": EngineAgent(short, temperature=0)}
        episodes = play(LongShort(), team, environment, seed=3)
        expected_team = {
            seat: TransformersAgent(transformers(path), temperature=0)
            for seat, path in (("long", LONG), ("short", SHORT))
        }
        expected = play(LongShort(), expected_team, environment, seed=3)
    for episode, other in zip(episodes, expected, strict=True):
        assert not episode.error
        assert episode.grade == other.grade
        assert_alike([step.reply for step in episode.transcript.steps], [step.reply for step in other.transcript.steps])


def test_a_dialogue_goes_on_where_its_past_is_cached(long: RolloutEngine) -> None:
    """Eight dialogues that all begin alike, at once, on both actors."""
    asyncio.run(long.update(lambda: None))  # which forgets what is cached
    opening, read, reused = [30] * 2 * BLOCK, long.prompt_tokens, long.prefix_tokens_reused

    def of_each() -> list[int]:
        return ray.get([actor.__ray_call__.remote(lambda self: self.engine.prompt_tokens) for actor in long.actors])

    async def dialogue(number: int) -> int:
        """How many of its later turns' tokens lie in blocks of its own past."""
        prompt, own = [*opening, 40 + number], 0
        for turn in range(3):
            reply = await long.sample(prompt, stops=(), max_tokens=20 + number, seed=turn)
            past = [*prompt, *reply.token_ids]
            prompt = [*past, *[50 + number] * 9]
            own += (len(past) - 1) // BLOCK * BLOCK if turn < 2 else 0
        return own

    async def play_all() -> int:
        return sum(await asyncio.gather(*(dialogue(number) for number in range(8))))

    before = of_each()
    own = asyncio.run(play_all())
    assert long.prefix_tokens_reused - reused >= own > 1000
    shares = [after - was for after, was in zip(of_each(), before, strict=True)]
    assert sum(shares) == long.prompt_tokens - read
    assert min(shares) > 0.3 * sum(shares)


def test_it_does_so_also_where_the_other_actor_is_idle(long: RolloutEngine) -> None:
    async def run() -> list[int | None]:
        first = await long.sample([45] * BLOCK, stops=(), max_tokens=5, seed=0)
        past = [*first.prompt_token_ids, *first.token_ids]
        begun = long._homes.find(past)
        await halt(long)
        busy = [endless(long, number) for number in range(3)]
        await until(long, 3)
        asked = asyncio.create_task(long.sample([*past, *[46] * BLOCK], stops=(), max_tokens=5, seed=0))
        await until(long, 4)
        await go_on(long)
        second = await asked
        for turn in busy:
            turn.cancel()
        return [begun, long._homes.find([*second.prompt_token_ids, *second.token_ids])]

    assert asyncio.run(run()) == [0, 0]


def test_where_a_dialogue_was_begun_is_found_by_its_past_alone() -> None:
    homes, opening = Homes(size=3), [1] * 2 * BLOCK
    first, second = [*opening, *[2] * BLOCK], [*opening, *[3] * BLOCK]
    homes.keep([*first, 9], 0)
    homes.keep(second, 1)
    assert homes.find([*first, 5, 5]) == 0
    assert homes.find([*second, *[4] * BLOCK]) == 1
    assert homes.find(first[:-1]) is None  # only begins like it
    assert homes.find(opening) is None
    assert homes.find([1]) is None
    homes.keep([*first, *[7] * BLOCK], 1)
    assert homes.find([*first, *[7] * BLOCK]) == 1
    assert homes.find([*first, *[8] * BLOCK]) == 0
    homes.keep([5] * BLOCK, 0)
    assert homes.find(first) is None  # the oldest
    assert homes.find(second) == 1


def test_a_cancelled_turn_is_called_off_in_vllm(long: RolloutEngine) -> None:
    async def run() -> list[Reply]:
        await halt(long)
        cancelled = [endless(long, number) for number in range(4)]
        others = asyncio.create_task(greedy(long))
        await until(long, 16)
        for turn in cancelled:
            turn.cancel()
        ended = await asyncio.gather(*cancelled, return_exceptions=True)
        assert [type(end) for end in ended] == [asyncio.CancelledError] * 4
        await until(long, 12)  # though nothing is computed
        await go_on(long)
        replies = await others
        endless(long).cancel()
        await long.update(lambda: None)  # which waits for all that still runs
        return replies

    assert_alike(asyncio.run(run()), asyncio.run(greedy(transformers(LONG))))
    assert not long._running


@pytest.mark.parametrize(("asked", "served"), [(None, 1024), (100, 100), (2000, 1024)])
def test_transformers_serves_the_context_that_is_asked_for(asked: int | None, served: int) -> None:
    actor, arguments, _ = _transformers(LONG, ON_CPU.model_copy(update={"context": asked}))
    assert asyncio.run(actor(**arguments, version=0).served()).context == served


def test_a_token_that_the_model_does_not_know_fails_its_turn_alone(long: RolloutEngine) -> None:
    async def run() -> list[Reply | BaseException]:
        strange = long.sample([5, long.vocabulary], stops=(), max_tokens=4, seed=0)
        known = long.sample([5, long.vocabulary - 1], stops=(), max_tokens=4, seed=0)
        return await asyncio.gather(strange, known, return_exceptions=True)

    strange, known = asyncio.run(run())
    assert isinstance(strange, InputError)
    assert str(strange).startswith("a token id must be below 472, the model's vocabulary; a prompt has 472: call")
    assert "\n" not in str(strange)
    assert isinstance(known, Reply)


# Weights


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_what_is_learnt_is_what_is_sampled_from(cluster: None, turns: list[Sample], tied: Path, kind: str) -> None:
    model = tied if kind == "tied" else LONG
    settings = LearnerSettings(learning_rate=3e-3, micro_batch_size=4)
    with (
        start(model, actors=1 if kind == "tied" else 2, version=7) as engine,
        OpenRLHFLearner(model, settings, updates=5, openrlhf=ON_CPU) as learner,
    ):
        assert engine.version == 7
        before = asyncio.run(greedy(engine))
        assert_serves(engine, model)
        policy = OpenRLHFPolicy(learner, engine)
        for version in (1, 2):
            learner.update(turns)
            asyncio.run(policy.publish())
            assert engine.version == version
            assert_serves(engine, model, learner.weights())
        changed = [now.token_ids != was.token_ids for now, was in zip(asyncio.run(greedy(engine)), before, strict=True)]
        assert sum(changed) > 6

        async def publish_nothing_new() -> bool:
            running = endless(engine)
            await until(engine, 1)
            await policy.publish(interrupt=True)
            ended = running.done()
            running.cancel()
            return ended

        assert not asyncio.run(publish_nothing_new()), "a reply had to end for what has not changed"


def test_replies_end_before_weights_change_and_turns_that_come_then_wait(changing: RolloutEngine, tied: Path) -> None:
    old, new = variant(tied, 1), variant(tied, 2)
    asyncio.run(changing.update(lambda: send(changing, old), version=3))

    async def run() -> tuple[list[Reply], list[Reply]]:
        await halt(changing)
        running = [endless(changing, number) for number in range(2)]
        await until(changing, 2)
        await go_on(changing)
        seen = []

        def broadcast() -> None:
            seen.append(ray.get([actor.get_num_unfinished_requests.remote() for actor in changing.actors]))
            send(changing, new)

        update = asyncio.create_task(changing.update(broadcast))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(greedy(changing))
        await update
        assert seen == [[0, 0]]
        return [await turn for turn in running], await waiting

    before, after = asyncio.run(run())
    assert {reply.version for reply in before} == {3}
    assert {reply.version for reply in after} == {4}
    with_old = transformers(tied, before_tying(old))
    for reply, other in zip(before, asyncio.run(both(with_old)), strict=True):
        assert_alike([reply], [other])
    assert_alike(after, asyncio.run(greedy(transformers(tied, before_tying(new)))))


def before_tying(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a state dict has them."""
    return {**parameters, "lm_head.weight": parameters["model.embed_tokens.weight"]}


async def both(engine: TransformersEngine) -> list[Reply]:
    asked = (
        engine.sample([30 + number] * 40, stops=("never",), max_tokens=900, seed=0, temperature=0)
        for number in range(2)
    )
    return list(await asyncio.gather(*asked))


def test_an_update_that_interrupts_leaves_nothing_of_the_old_weights(changing: RolloutEngine, tied: Path) -> None:
    old, new = variant(tied, 1), variant(tied, 2)
    asyncio.run(changing.update(lambda: send(changing, old), version=5))

    async def run() -> list[Reply]:
        await halt(changing)
        running = [endless(changing, number) for number in range(4)]
        await until(changing, 4)
        await go_on(changing)
        # Beside a turn that came after them each of them has said something.
        await asyncio.gather(*(changing.sample([5], stops=(), max_tokens=5, seed=0) for _ in range(2)))
        await changing.update(lambda: send(changing, new), interrupt=True)
        assert not any(turn.done() for turn in running)
        return [await turn for turn in running]

    replies = asyncio.run(run())
    assert {reply.version for reply in replies} == {5}
    models = {version: transformers(tied, before_tying(weights)).model for version, weights in ((5, old), (6, new))}
    for reply in replies:
        # Each token is of the weights of its version, and not of the others.
        assert sorted(set(reply.versions)) == [5, 6]
        assert list(reply.versions) == sorted(reply.versions)
        for version, model in models.items():
            subject = Subject(lambda *_: None, model, changing.tokenizer, 1024)  # type: ignore[arg-type, return-value]
            apart = subject.log_probabilities(reply, 0).gather(-1, torch.tensor(reply.token_ids)[:, None])[:, 0]
            off = (apart - torch.tensor(reply.log_probabilities)).abs()
            of_it = torch.tensor(reply.versions) == version
            assert off[of_it].max() < 1e-3
            assert off[~of_it].max() > 1e-2
    assert_serves(changing, tied, before_tying(new))
    # What those replies have said is no more in the cache than what was asked before them.
    again = asyncio.run(both_after(changing, replies))
    assert_alike(again, asyncio.run(both_after(transformers(tied, before_tying(new)), replies)))


async def both_after(engine: Engine, replies: Sequence[Reply]) -> list[Reply]:
    """What follows on the first words of some replies."""
    asked = (
        engine.sample(reply.prompt_token_ids + reply.token_ids[:100], stops=(), max_tokens=10, seed=0, temperature=0)
        for reply in replies
    )
    return list(await asyncio.gather(*asked))


def test_after_an_update_that_failed_nothing_is_sampled_until_one_succeeds(changing: RolloutEngine, tied: Path) -> None:
    weights, version = variant(tied, 3), changing.version
    name, embedding = next(iter(weights.items()))
    with pytest.raises(ray.exceptions.RayTaskError):
        asyncio.run(changing.update(lambda: send(changing, {name: embedding.bfloat16()})))
    with pytest.raises(RuntimeError, match=r"the weights of .* are not all of one version: update them"):
        asyncio.run(greedy(changing))
    assert changing.version == version
    asyncio.run(changing.update(lambda: send(changing, weights)))
    assert_serves(changing, tied, before_tying(weights))

    async def fail_in_the_middle() -> None:
        await halt(changing)
        running = endless(changing)
        await until(changing, 1)
        await go_on(changing)
        with pytest.raises(ZeroDivisionError):
            await changing.update(lambda: 1 / 0, interrupt=True)
        with pytest.raises(RuntimeError, match="are not all of one version"):
            await running

    asyncio.run(fail_in_the_middle())
    asyncio.run(changing.update(lambda: send(changing, weights)))
    assert_serves(changing, tied, before_tying(weights))


# Faults


def of_vllm(pid: int) -> list[int]:
    """The processes of vLLM that a process has started, from whichever of its threads."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for children in threads for child in children.read_text().split()]
    return [child for child in children if "resource_tracker" not in Path(f"/proc/{child}/cmdline").read_text()]


def wait_for_the_end_of(pids: Sequence[int]) -> None:
    assert not psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=600)[1]


async def until_it_tells(actor: ActorHandle) -> None:
    """Until it tells of its engine's death, which raises EngineDiedError."""
    while True:
        await actor.served.remote()


def test_an_actor_that_died_is_named_and_the_others_go_on_until_it_is_restarted(
    changing: RolloutEngine, tied: Path
) -> None:
    weights = variant(tied, 4)
    asyncio.run(changing.update(lambda: send(changing, weights)))
    pids = ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in changing.actors])

    async def run() -> list[Reply | BaseException]:
        await halt(changing)
        running = [endless(changing, number) for number in range(4)]
        await until(changing, 4)
        os.kill(pids[0], 9)
        await go_on(changing, slice(1, None))
        return await asyncio.gather(*running, return_exceptions=True)

    children = [child for pid in pids for child in of_vllm(pid)]
    assert len(children) == 2
    ended = asyncio.run(run())
    assert [type(end) for end in ended] == [EngineDiedError, Reply] * 2
    assert "\n" not in str(ended[0])
    assert str(ended[0]).startswith(f"actor 0 of {tied} died (")
    assert str(ended[0]).endswith("): its turns are lost; call restart()")
    assert_serves(changing, tied, before_tying(weights))  # with the other alone
    with pytest.raises(EngineDiedError, match=r"actor 0 of .* died"):
        asyncio.run(changing.update(lambda: pytest.fail("there is nobody to send to")))
    assert_serves(changing, tied, before_tying(weights))
    wait_for_the_end_of(children[:1])  # its vLLM
    os.kill(children[1], 9)
    with pytest.raises(EngineDiedError, match=r"actor 1 of .* died \(vLLM's process ended\)"):
        asyncio.run(greedy(changing))
    with pytest.raises(EngineDiedError, match=r"no actor of .* is alive \(.*\): call restart"):
        asyncio.run(greedy(changing))
    asyncio.run(changing.restart())
    with pytest.raises(RuntimeError, match="are not all of one version"):
        asyncio.run(greedy(changing))
    asyncio.run(changing.update(lambda: send(changing, weights)))
    assert_serves(changing, tied, before_tying(weights))


class Source:
    """Sends an engine always the same weights, of version 9."""

    def __init__(self, engine: RolloutEngine, weights: Mapping[str, torch.Tensor]) -> None:
        self._engine, self._weights = engine, weights
        self.known: list[int] = []

    def connect(self, actors: Sequence[ActorHandle]) -> None:
        self.known.append(len(set(actors)))

    def broadcast(self) -> int:
        send(self._engine, self._weights)
        return 9


def test_with_a_source_of_weights_no_turn_is_lost(changing: RolloutEngine, tied: Path) -> None:
    weights = variant(tied, 6)
    changing.source = source = Source(changing, weights)

    async def run(pids: Sequence[int]) -> list[Reply]:
        await halt(changing)
        running = [endless(changing, number) for number in range(2)]
        await until(changing, 2)
        for pid in pids:
            os.kill(pid, 9)
        await go_on(changing, slice(len(pids), None))
        return [await turn for turn in running]

    def processes() -> list[int]:
        alive = [changing.actors[number] for number in changing._alive()]
        return ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in alive])

    expected = asyncio.run(both(transformers(tied, before_tying(weights))))
    asyncio.run(changing.update(source.broadcast, version=9))
    assert_alike(asyncio.run(run(processes()[:1])), expected)
    assert source.known == [], "the other has answered in its place"

    async def lose_the_other_as_it_falls_asleep() -> None:
        """It is vLLM's own process, of whose end no turn tells, since none runs."""
        (child,) = of_vllm(processes()[0])
        os.kill(child, 9)
        with pytest.raises(EngineDiedError, match="vLLM's process ended"):
            await until_it_tells(changing.actors[1])
        assert 1 in changing._alive()
        await changing.sleep()
        await changing.wake()
        assert not changing._alive()
        await changing.forget()
        assert changing.whole

    asyncio.run(lose_the_other_as_it_falls_asleep())
    assert source.known == [2]
    assert_alike(asyncio.run(run(processes())), expected)
    assert source.known == [2, 2]
    assert_serves(changing, tied, before_tying(weights))
    assert changing.version == 9


def bare(close: Callable[[], None] = lambda: None) -> RolloutEngine:
    """One that starts nothing, with two actors that are none."""
    served = Served(context=64, ends=frozenset({1}), vocabulary=472, cache_tokens=64, dtype=torch.float32)
    actors = [object(), object()]
    return RolloutEngine(lambda number: actors[number], actors, served, LONG, by_vllm=True, close=close)


def test_one_whose_actors_have_all_died_gives_back_their_room_once(cluster: None) -> None:
    closed = list[str]()
    engine = bare(lambda: closed.append("closed"))
    engine._dead = dict.fromkeys(range(2), "gone")
    engine.close()
    engine.close()
    assert closed == ["closed"]


class Ended:
    """Stands for Ray's reference to what has ended."""

    def future(self) -> "Future[None]":
        future = Future[None]()
        future.set_result(None)
        return future


def test_what_runs_may_end_while_it_is_looked_at() -> None:
    """Turns end in a thread of Ray's."""
    engine, last, stop = bare(), Ended(), threading.Event()
    engine._running = {Ended(): (number % 2, 0.0) for number in range(300)}

    def end_and_begin() -> None:
        while not stop.is_set():
            engine._running[last] = 1, 0.0
            del engine._running[last]

    turns, switches = threading.Thread(target=end_and_begin), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    turns.start()
    try:
        for _ in range(20):
            assert engine.waits_for().startswith("150 turn(s) for actor 0")
            engine._choose((30,) * BLOCK)
            asyncio.run(engine._idle())
    finally:
        stop.set()
        turns.join()
        sys.setswitchinterval(switches)


def test_closing_ends_all_processes_and_fails_what_runs(cluster: None) -> None:
    engine = start(SHORT, actors=1)
    (pid,) = ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in engine.actors])
    pids = [pid, *of_vllm(pid)]
    assert len(pids) == 2

    async def run() -> BaseException | Reply:
        await halt(engine)
        running = endless(engine)
        await until(engine, 1)
        await asyncio.to_thread(engine.close)
        return (await asyncio.gather(running, return_exceptions=True))[0]

    assert isinstance(asyncio.run(run()), EngineDiedError)
    engine.close()  # does nothing
    with pytest.raises(EngineDiedError, match="the engine is closed"):
        asyncio.run(greedy(engine))
    wait_for_the_end_of(pids)


def test_weights_that_have_diverged_fail_each_reply(changing: RolloutEngine, tied: Path) -> None:
    """After all others that sample: what is not finite stays in vLLM's memory, and comes up with other weights."""
    diverged = {name: torch.full_like(weight, torch.nan) for name, weight in variant(tied, 5).items()}
    asyncio.run(changing.update(lambda: send(changing, diverged)))
    with pytest.raises(FloatingPointError, match="the model's logits are not finite numbers: its weights have"):
        asyncio.run(greedy(changing))


def test_an_engine_that_dies_again_and_again_ends_the_run(changing: RolloutEngine, tied: Path) -> None:
    """The last to use the engine."""
    changing.source, changing._deaths = Source(changing, variant(tied, 6)), LIVES
    for actor in changing.actors:
        ray.kill(actor)
    with pytest.raises(InputError, match=r"that of .* died 4 times in a row \(.*\): give it fewer turns at once"):
        asyncio.run(greedy(changing))


# Bad input


def test_what_cannot_be_served_is_named(cluster: None, long: RolloutEngine, tmp_path: Path) -> None:
    before = places()
    for temperature in (0.001, 2.5):
        with pytest.raises(InputError, match=r"for vLLM, temperature must be 0 or within \[0\.01, 2\]; got"):
            EngineAgent(long, temperature=temperature)
    with pytest.raises(InputError, match="there is no folder"):
        start(tmp_path / "missing")
    with pytest.raises(InputError, match=r"9 actor\(s\) need 9 CPU\(s\), and Ray has 8: ask for fewer actors"):
        start(LONG, actors=9)
    with pytest.raises(InputError, match=r"1 actor\(s\) need 1 GPU\(s\), and Ray has 0"):
        RolloutEngine.start(LONG, OpenRLHFSettings())
    with pytest.raises(InputError, match="as many cache_gigabytes as its context needs") as failure:
        RolloutEngine.start(LONG, ON_CPU.model_copy(update={"cache_gigabytes": 0.001}))
    assert "\n" not in str(failure.value)
    assert places() == before


def places() -> set[str]:
    groups = ray.util.placement_group_table().values()
    return {group["placement_group_id"] for group in groups if group["state"] != "REMOVED"}
