"""Real vLLM on the shipped tiny models, held against the transformers engine on the same models."""

import asyncio
import gc
import math
import multiprocessing
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from turnwise.agents.agent import Agent
from turnwise.agents.contract import QUESTION
from turnwise.agents.tiny import LONG, NOVICE, ROUTER, SHORT
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.agents.transformers_engine import load_tokenizer
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.transcript import Message, Reply, Turn
from turnwise.protocols.long_short import LongShort
from turnwise.rl.rollout import play

pytest.importorskip("vllm", reason="needs vLLM: make vllm")

import psutil
from vllm.v1.engine.exceptions import EngineDeadError

from turnwise.agents.vllm_agent import VLLMAgent, VLLMEngine

# What vLLM imports of torch says this.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def turn(index: int, max_tokens: int = 40, stops: tuple[str, ...] = ("</think>",), *, prefill: str = "<think>") -> Turn:
    """Questions of many lengths."""
    question = " ".join(QUESTION.format(index + n) for n in range(1 + index % 4))
    return Turn("seat", "state", (Message("user", question),), stops, max_tokens, prefill)


async def replies(agent: Agent, turns: Sequence[Turn], seed: int = 0) -> list[Reply]:
    return list(await asyncio.gather(*(agent.reply(asked, seed + n) for n, asked in enumerate(turns))))


def ask(agent: Agent, turns: Sequence[Turn], seed: int = 0) -> list[Reply]:
    return asyncio.run(replies(agent, turns, seed))


def sampled(replies: Sequence[Reply]) -> list[tuple[int, ...]]:
    return [reply.token_ids for reply in replies]


def assert_alike(replies: Sequence[Reply], expected: Sequence[Reply]) -> None:
    """Equal in all but the last bits of the log-probabilities."""
    for reply, other in zip(replies, expected, strict=True):
        assert reply.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-3)
        assert (reply.text, reply.finish, reply.stop) == (other.text, other.finish, other.stop)
        assert (reply.prompt_token_ids, reply.token_ids) == (other.prompt_token_ids, other.token_ids)
        assert (reply.token_count, reply.tokenizer) == (other.token_count, other.tokenizer)


def endless(engine: VLLMEngine, length: int = 5) -> "asyncio.Task[Reply]":
    """A request that goes on for a thousand tokens, or up to the context."""
    reply = engine.sample([30] * length, stops=("never",), max_tokens=1000, seed=0, temperature=0)
    return asyncio.create_task(reply)


async def halt(engine: VLLMEngine) -> None:
    """Until `go_on`, vLLM takes requests and computes nothing: what happens meanwhile meets each of them running."""
    await engine._thread.wait(engine._llm.pause_generation(mode="keep"))


async def go_on(engine: VLLMEngine) -> None:
    await engine._thread.wait(engine._llm.resume_generation())


async def until_running(engine: VLLMEngine, number: int) -> None:
    while engine._llm.get_num_unfinished_requests() != number:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def load(path: Path) -> VLLMEngine:
    return VLLMEngine.load(path, cache_gigabytes=0.064)


@pytest.fixture(scope="module")
def long() -> Iterator[VLLMEngine]:
    with load(LONG) as engine:
        yield engine


@pytest.fixture(scope="module")
def short() -> Iterator[VLLMEngine]:
    with load(SHORT) as engine:
        yield engine


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(LONG, dtype=torch.float32)


@pytest.fixture(scope="module")
def reference() -> TransformersAgent:
    return TransformersAgent(TransformersEngine.load(LONG), temperature=0)


@pytest.fixture
def greedy(long: VLLMEngine) -> VLLMAgent:
    return VLLMAgent(long, temperature=0)


def test_two_engines_play_greedily_what_transformers_plays(long: VLLMEngine, short: VLLMEngine) -> None:
    team = {"long": VLLMAgent(long, temperature=0), "short": VLLMAgent(short, temperature=0)}
    expected_team = {
        seat: TransformersAgent(TransformersEngine.load(path), temperature=0)
        for seat, path in (("long", LONG), ("short", SHORT))
    }
    with MathGrader() as grader:
        environment = arithmetic(grader, problem_set="mixed", count=96, seed=11)
        episodes = play(LongShort(), team, environment, seed=3)
        expected = play(LongShort(), expected_team, environment, seed=3)
    assert not any(episode.error for episode in episodes)
    seats = Counter(step.seat for episode in episodes for step in episode.transcript.steps)
    assert min(seats["long"], seats["short"]) >= 96
    for episode, other in zip(episodes, expected, strict=True):
        assert episode.grade == other.grade
        assert_alike([step.reply for step in episode.transcript.steps], [step.reply for step in other.transcript.steps])


def test_greedy_and_sampled_turns_share_a_batch(long: VLLMEngine, greedy: VLLMAgent) -> None:
    turns = [turn(index) for index in range(8)]
    expected = ask(greedy, turns), ask(VLLMAgent(long, temperature=1.3), turns)

    async def both() -> list[list[Reply]]:
        return await asyncio.gather(replies(greedy, turns), replies(VLLMAgent(long, temperature=1.3), turns))

    for mixed, apart in zip(asyncio.run(both()), expected, strict=True):
        assert_alike(mixed, apart)


def test_every_number_is_a_seed(long: VLLMEngine) -> None:
    agent, asked = VLLMAgent(long, temperature=1.5), turn(3)
    for seed in (-1, 2**63 - 1, 0):  # the first is what vLLM itself reads as none
        assert len({asyncio.run(agent.reply(asked, seed)).token_ids for _ in range(3)}) == 1


def test_seeded_prompts_beyond_what_one_step_computes(long: VLLMEngine) -> None:
    """vLLM computes prompts in pieces by default, and its process dies of that where they have seeds, on a CPU."""
    prompts = [[5 + (n * k) % 400 for k in range(1000)] for n in range(1, 25)]

    async def run() -> list[Reply]:
        asked = (long.sample(prompt, stops=(), max_tokens=4, seed=n) for n, prompt in enumerate(prompts))
        return await asyncio.gather(*asked)

    first = asyncio.run(run())
    assert sampled(asyncio.run(run())) == sampled(first)


def test_tags_end_a_reply_where_transformers_ends_it(greedy: VLLMAgent, reference: TransformersAgent) -> None:
    whole = ask(reference, [turn(3, 60, ())])[0]
    assert whole.token_count > 20
    pieces = [reference.engine.tokenizer.decode([token]) for token in whole.token_ids]
    spans = [span for n in range(15) for width in (1, 2, 3) if (span := "".join(pieces[n : n + width]).strip())]
    within = [span[1:] for span in spans if len(span) > 2]
    turns = [turn(3, 60, ("</answer>", tag)) for tag in dict.fromkeys(spans + within)]
    turns += [turn(3, 60, (tag, other)) for tag, other in zip(spans, reversed(spans), strict=True)]
    turns += [turn(n, 400, ("</think>",)) for n in range(8)] + [turn(n, 60, ()) for n in range(8)]
    got = ask(greedy, turns)
    assert_alike(got, ask(reference, turns))
    assert {reply.finish for reply in got} == {"stop", "length", "end"}
    for asked, reply in zip(turns, got, strict=True):
        assert reply.finish != "stop" or (reply.stop in asked.stops and str(reply.stop) in reply.text)
    assert sum(reply.finish == "stop" and (reply.stop or "") not in pieces for reply in got) >= 10


def test_budget_and_context(long: VLLMEngine, reference: TransformersAgent) -> None:
    def one(engine: VLLMEngine | TransformersEngine, length: int, max_tokens: int = 100) -> Reply:
        return asyncio.run(engine.sample([30] * length, stops=(), max_tokens=max_tokens, seed=0, temperature=0))

    assert long.context == 1024
    for length, max_tokens, expected in ((1021, 100, 3), (1023, 100, 1), (7, 1, 1), (7, 9, 9)):
        reply = one(long, length, max_tokens)
        assert (reply.finish, reply.token_count) == ("length", expected)
        assert_alike([reply], [one(reference.engine, length, max_tokens)])
    for length in (0, 1024, 5000):
        with pytest.raises(ValueError, match=f"from 1 to 1023 tokens; this one has {length}") as failure:
            one(long, length)
        assert not isinstance(failure.value, InputError)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        one(long, 7, 0)
    with pytest.raises(
        InputError, match=r"must be below 472, .* a prompt has 472: call model\.resize_token_embeddings"
    ):
        asyncio.run(long.sample([30, 472, 471], stops=(), max_tokens=9, seed=0))
    assert asyncio.run(long.sample([30, 471], stops=(), max_tokens=1, seed=0)).token_count == 1


def test_cancelled_request_leaves_vllm_and_no_other(long: VLLMEngine, greedy: VLLMAgent) -> None:
    turns = [turn(index, 30) for index in range(4)]
    expected = ask(greedy, turns)

    async def run() -> list[Reply | BaseException]:
        await halt(long)
        called_off = endless(long)
        tasks = [asyncio.create_task(greedy.reply(asked, n)) for n, asked in enumerate(turns)]
        await until_running(long, 5)
        called_off.cancel()
        await until_running(long, 4)
        await go_on(long)
        return await asyncio.gather(*tasks, called_off, return_exceptions=True)

    *others, cancelled = asyncio.run(run())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert_alike(others, expected)
    assert long._llm.get_num_unfinished_requests() == 0


def test_turns_of_a_dialogue_share_their_beginning(long: VLLMEngine, reference: TransformersAgent) -> None:
    """Eight four-turn dialogues at once: nearly all that an ideal cache of blocks of 32 tokens could give."""
    ideal = 0
    asyncio.run(long.update(LONG, version=0))  # which empties the cache
    before = long.prefix_tokens_reused

    async def dialogue(agent: Agent, index: int) -> list[Reply]:
        nonlocal ideal
        messages, said = turn(index).messages, []
        for n in range(4):
            reply = await agent.reply(Turn("seat", "state", messages, (), 60), n)
            if said and agent is not reference:
                ideal += (len(said[-1].prompt_token_ids) + said[-1].token_count - 1) // 32 * 32
            said.append(reply)
            messages += (Message("assistant", reply.text, reply), Message("user", QUESTION.format(n)))
        return said

    async def run(agent: Agent) -> list[Reply]:
        return [reply for said in await asyncio.gather(*(dialogue(agent, n) for n in range(8))) for reply in said]

    assert_alike(asyncio.run(run(VLLMAgent(long, temperature=0))), asyncio.run(run(reference)))
    assert long.prefix_tokens_reused - before >= 0.9 * ideal > 500


def test_weights_are_updated_under_load(long: VLLMEngine) -> None:
    """Each reply is what the weights of the version that it carries say, and of no other."""
    folders = {0: LONG, 1: NOVICE}
    # Half of them end at a tag that vLLM does not know, which calls their requests off.
    turns = [turn(index, 60, ("</think>", " modulo") if index % 2 else ("</think>",)) for index in range(16)]
    expected = {
        parity: ask(TransformersAgent(TransformersEngine.load(path), temperature=0), turns)
        for parity, path in folders.items()
    }
    assert {reply.stop for reply in expected[0]} >= {"</think>", " modulo"}
    for reply, other in zip(expected[0], expected[1], strict=True):
        assert reply.log_probabilities != pytest.approx(other.log_probabilities, abs=2e-3)
    agent = VLLMAgent(long, temperature=0)
    seen: Counter[int] = Counter()

    async def speak(index: int, ended: asyncio.Event) -> None:
        while not ended.is_set():
            begun = long.version
            reply = await agent.reply(turns[index], 0)
            assert begun <= reply.version <= long.version
            assert_alike([reply], [expected[reply.version % 2][index]])
            seen[reply.version] += 1

    async def run() -> None:
        ended = asyncio.Event()
        speakers = [asyncio.create_task(speak(index, ended)) for index in range(16)]
        await asyncio.sleep(0.1)
        for version in range(1, 21):
            folder = folders[version % 2]
            await long.update(load_file(folder / "model.safetensors") if version % 3 else folder)
            assert long.version == version
            await asyncio.sleep(0.1)
        ended.set()
        await asyncio.gather(*speakers)

    asyncio.run(long.update(LONG, version=0))
    asyncio.run(run())
    assert set(seen) == set(range(21))
    assert_alike(ask(agent, turns), expected[0])


def test_update_that_fails_is_named_and_the_next_one_mends_it(long: VLLMEngine, greedy: VLLMAgent) -> None:
    asyncio.run(long.update(LONG, version=4))
    expected = ask(greedy, [turn(2)])
    good = load_file(LONG / "model.safetensors")
    lacking = {name: weight for name, weight in good.items() if "layers.2" not in name}
    misshapen = good | {"model.norm.weight": torch.ones(3)}
    for weights, message in (
        (lacking, r"must have every weight of the model; it lacks model\.layers\.2\."),
        (misshapen, "weights must fit the model"),
        (good | {"no.such": torch.ones(3)}, "weights must fit the model .*no"),
    ):
        with pytest.raises(InputError, match=message) as failure:
            asyncio.run(long.update(weights))
        assert "\n" not in str(failure.value)
        with pytest.raises(RuntimeError, match="were replaced in part: update them again"):
            ask(greedy, [turn(2)])
        asyncio.run(long.update(good, version=4))
        assert_alike(ask(greedy, [turn(2)]), expected)
    with pytest.raises(InputError, match=r"folder with safetensors files; .* has none"):
        asyncio.run(long.update(LONG.parent))
    assert ask(greedy, [turn(2)])[0].version == 4


def test_diverged_weights_are_named(long: VLLMEngine, greedy: VLLMAgent) -> None:
    expected, good = ask(greedy, [turn(1)]), load_file(LONG / "model.safetensors")
    asyncio.run(long.update(good | {"lm_head.weight": torch.full_like(good["lm_head.weight"], torch.nan)}))
    with pytest.raises(FloatingPointError, match="its weights have diverged"):
        ask(greedy, [turn(1)])
    asyncio.run(long.update(good))
    assert_alike(ask(greedy, [turn(1)]), expected)


def tied(seed: int) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(ROUTER, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_tied_weights_are_updated_together_and_a_closed_engine_says_so(tmp_path: Path) -> None:
    """Most small models tie their head to their embedding, which vLLM on a CPU gets wrong where it repacks weights."""
    shutil.copytree(ROUTER, tmp_path, dirs_exist_ok=True)
    models = tied(0), tied(1)
    models[0].save_pretrained(tmp_path)
    turns = [turn(index) for index in range(4)]
    tokenizer = load_tokenizer(ROUTER)
    expected = [ask(TransformersAgent(TransformersEngine(model, tokenizer), temperature=0), turns) for model in models]
    processes = len(multiprocessing.active_children())
    engine = VLLMEngine.load(tmp_path, cache_gigabytes=0.064, context=256, version=7)
    assert (engine.context, engine.cache_tokens, engine.name) == (256, 20832, str(tmp_path))
    assert len(multiprocessing.active_children()) == processes + 1
    agent = VLLMAgent(engine, temperature=0, name="tied")
    replies = ask(agent, turns)
    assert_alike(replies, expected[0])
    assert {(reply.model, reply.version) for reply in replies} == {("tied", 7)}
    asyncio.run(engine.update(models[1].state_dict()))
    assert_alike(ask(agent, turns), expected[1])
    asyncio.run(engine.update(tmp_path))
    assert_alike(ask(agent, turns), expected[0])

    async def close_early() -> None:
        await halt(engine)
        called_off = endless(engine)
        await until_running(engine, 1)
        await asyncio.to_thread(engine.close)
        await called_off

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(close_early())
    assert len(multiprocessing.active_children()) == processes
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        ask(agent, turns)


def test_death_of_the_process_fails_each_request_by_name() -> None:
    others = set(multiprocessing.active_children())

    async def run(engine: VLLMEngine) -> list[Reply | BaseException]:
        await halt(engine)
        tasks = [endless(engine, length) for length in range(1, 5)]
        await until_running(engine, 4)
        (process,) = set(multiprocessing.active_children()) - others
        process.kill()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with load(LONG) as engine:
        assert [type(error).__name__ for error in asyncio.run(run(engine))] == ["EngineDeadError"] * 4
        with pytest.raises(EngineDeadError):
            asyncio.run(engine.sample([30], stops=(), max_tokens=1, seed=0))


PROGRAM = """
import sys, time
from turnwise.agents.vllm_agent import VLLMEngine
if __name__ == "__main__":
    engine = VLLMEngine.load(sys.argv[1], cache_gigabytes=0.064)
    print("it serves", flush=True)
    time.sleep(600)
"""


def test_vllm_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    """Killed, a program can close nothing; the memory that vLLM holds is to be free all the same."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, program, LONG], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "it serves\n"
        processes = psutil.Process(started.pid).children(recursive=True)
        started.kill()
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=600)
    assert not alive


def loop_threads() -> int:
    return sum(thread.name.startswith("vLLM ") for thread in threading.enumerate())


@pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning")
def test_what_cannot_be_served_is_named(long: VLLMEngine, tmp_path: Path) -> None:
    for temperature in (0.001, 2.5):
        with pytest.raises(InputError, match=r"for vLLM, temperature must be 0 or within \[0\.01, 2\]; got"):
            VLLMAgent(long, temperature=temperature)
    for temperature, top_p in ((-1.0, 1.0), (1.0, 0.0), (1.0, 1.5)):
        with pytest.raises(InputError, match=r"temperature must be at least 0 and top_p within \(0, 1\]; got"):
            VLLMAgent(long, temperature=temperature, top_p=top_p)
    for settings in ({"max_running": 0}, {"cache_gigabytes": 0.0}, {"cache_gigabytes": math.inf}):
        with pytest.raises(
            InputError, match=r"max_running must be at least 1 and cache_gigabytes a number above 0; got"
        ):
            VLLMEngine.load(LONG, **settings)
    with pytest.raises(InputError, match="there is no folder"):
        VLLMEngine.load(tmp_path / "missing")
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        VLLMEngine.load(tmp_path)
    shutil.copy(LONG / "tokenizer.json", tmp_path)
    with pytest.raises(InputError, match="no chat template"):
        VLLMEngine.load(tmp_path)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(LONG / name, tmp_path)
    with pytest.raises(InputError, match=r"cannot serve .* with vLLM") as failure:
        VLLMEngine.load(tmp_path)
    assert "\n" not in str(failure.value)
    threads = loop_threads()
    with pytest.raises(InputError, match="as many cache_gigabytes as its context needs"):
        VLLMEngine.load(LONG, cache_gigabytes=0.001)
    assert loop_threads() == threads
    gc.collect()  # what vLLM leaves open when it cannot start, while its warning is ignored
