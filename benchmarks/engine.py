"""Times the transformers engine against plain `model.generate`, prefix sharing against none, and vLLM against both.

    python benchmarks/engine.py
    python benchmarks/engine.py --only engines

The model is a random Qwen2 of 0.7 million parameters in float32, the prompts are 60 to 300 random tokens, and all sides
sample at temperature 1. Each cell is the median over interleaved repetitions of this one run. Take the ratios, and
leave the tokens per second to the machine they were taken on.

"batches": against a static batch; "equal" replies have 64 tokens; "mixed" ones 8 to 120, where `generate` goes on to
the longest of its batch and only the tokens asked for count. Four times as many replies are asked for as run at once.
"reuse": episodes of four turns, with what was computed for a turn kept for the next, and without.
"sharing": 16 samples of 32 tokens for each of 8 growing prefixes of a prompt of 480 tokens, all asked for at once.
"engines", where vLLM is installed (make vllm): episodes of four turns of 32 tokens, between them 30 tokens of a
partner, by way of the agents, which is what a user gets: `TransformersAgent`, `VLLMAgent`, and `TokenServerAgent` over
HTTP to a server on this machine. Prompts are never repeated, so that all reuse is between the turns of an episode. It
is compared, for turns 2 to 4, with what a cache could know at best: the last prompt and all of its reply but the last
token, which was sampled and not computed; token by token, and in vLLM's whole blocks of 32 tokens. All caches have the
same size; the server's hits are read from its /metrics.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from turnwise.agents.agent import Agent
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.environments.transcript import Message, Reply, Turn

VOCABULARY = 400
WAVES = 4
SAMPLES = 16
STEPS = 8
STEP_TOKENS = 60
RUNNING = (1, 16, 64, 256)
TURNS = 4
TURN_TOKENS = 32
BLOCK = 32
Request = tuple[list[int], int]


def tiny() -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=384,
        max_position_embeddings=2048,
    )
    # Its end of sequence lies beyond the model's vocabulary: nothing ends a reply early.
    words = {f"Ġ{token}": token for token in range(VOCABULARY)} | {"<end>": VOCABULARY}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="Ġ0"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for message in messages %} {{ message.content }}{% endfor %}"
    return Qwen2ForCausalLM(config).eval(), PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", chat_template=template
    )


def requests(count: int, mixed: bool) -> list[Request]:
    random = np.random.default_rng(0)
    return [
        (
            random.integers(0, VOCABULARY, random.integers(60, 300)).tolist(),
            int(random.integers(8, 121)) if mixed else 64,
        )
        for _ in range(count)
    ]


def generate(model: Qwen2ForCausalLM, asked: list[Request], running: int) -> None:
    for start in range(0, len(asked), running):
        batch = asked[start : start + running]
        width = max(len(prompt) for prompt, _ in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
        longest = max(tokens for _, tokens in batch)
        model.generate(ids, attention_mask=mask, max_new_tokens=longest, do_sample=True, top_k=0, pad_token_id=0)


def sample(engine: TransformersEngine, asked: list[Request]) -> None:
    """Asks for all at once; nothing is known from an earlier run."""
    engine.version += 1

    async def run() -> None:
        await asyncio.gather(
            *(
                engine.sample(prompt, stops=(), max_tokens=tokens, seed=seed)
                for seed, (prompt, tokens) in enumerate(asked)
            )
        )

    asyncio.run(run())


def converse(engine: TransformersEngine, asked: list[Request]) -> None:
    """Four turns of 32 tokens each, between them 30 tokens of a partner; nothing is known from an earlier run."""
    engine.version += 1

    async def episode(seed: int, prompt: list[int]) -> None:
        heard = prompt[:30]
        for turn in range(4):
            reply = await engine.sample(prompt, stops=(), max_tokens=32, seed=4 * seed + turn)
            prompt = [*reply.prompt_token_ids, *reply.token_ids, *heard]

    async def run() -> None:
        await asyncio.gather(*(episode(seed, prompt) for seed, (prompt, _) in enumerate(asked)))

    asyncio.run(run())


def rollouts() -> tuple[list[Request], float]:
    """What the rollouts ask for, and the share of their prompts' tokens that an ideal cache spares.

    It computes each step once, and of every other sample the last token.
    """
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, STEPS * STEP_TOKENS).tolist()
    prefixes = [prompt[: STEP_TOKENS * step] for step in range(1, STEPS + 1) for _ in range(SAMPLES)]
    total = sum(map(len, prefixes))
    return [(prefix, 32) for prefix in prefixes], 1 - (len(prompt) + len(prefixes) - STEPS) / total


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def versus(ours: Callable[[], None], theirs: Callable[[], None], repetitions: int) -> tuple[float, float]:
    """Median seconds of both, taken in turns."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repetitions + 1)][1:]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def batches(repetitions: int) -> None:
    model, tokenizer = tiny()
    print("running  replies   engine tok/s   generate tok/s   ratio")
    for running in (1, 16, 128):
        engine = TransformersEngine(model, tokenizer, max_running=running)
        for mixed in (False, True):
            asked = requests(WAVES * running, mixed)
            ours, theirs = versus(partial(sample, engine, asked), partial(generate, model, asked, running), repetitions)
            tokens = sum(count for _, count in asked)
            label = "mixed" if mixed else "equal"
            print(f"{running:7}  {label:7} {tokens / ours:14.0f} {tokens / theirs:16.0f} {theirs / ours:7.2f}")


def reuse(repetitions: int) -> None:
    model, tokenizer = tiny()
    print("running  4-turn episodes: prefix reuse, speed against none   prompt tokens reused")
    for running in (1, 16, 128):
        asked = requests(max(4, running), mixed=False)
        plain = TransformersEngine(model, tokenizer, max_running=running, prefix_tokens=0)
        keeping = TransformersEngine(model, tokenizer, max_running=running)
        ours, theirs = versus(partial(converse, keeping, asked), partial(converse, plain, asked), repetitions)
        share = keeping.prefix_tokens_reused / keeping.prompt_tokens
        print(f"{running:7}  {theirs / ours:47.2f} {share:22.0%}")


def sharing(repetitions: int) -> None:
    model, tokenizer = tiny()
    print("running  rollouts: prefix sharing, speed against none   prompt tokens reused   by an ideal cache")
    asked, ideal = rollouts()
    for running in (16, 128):
        plain = TransformersEngine(model, tokenizer, max_running=running, prefix_tokens=0)
        keeping = TransformersEngine(model, tokenizer, max_running=running)
        ours, theirs = versus(partial(sample, keeping, asked), partial(sample, plain, asked), repetitions)
        share = keeping.prefix_tokens_reused / keeping.prompt_tokens
        print(f"{running:7}  {theirs / ours:43.2f} {share:22.1%} {ideal:19.1%}")


class Contender(NamedTuple):
    """An engine by way of its agent, and the prompt tokens that it has reused so far."""

    agent: Agent
    reused: Callable[[], int]

    def play(self, running: int, repetition: int) -> tuple[float, float, float]:
        """Tokens per second, and what was reused of what could be, by the token and by the block.

        `running` episodes are played at once. Their prompts were never seen before.
        """
        random = np.random.default_rng((running, repetition))
        prompts = [random.integers(0, VOCABULARY, random.integers(60, 300)).tolist() for _ in range(max(4, running))]
        slots = asyncio.Semaphore(running)

        async def episodes() -> list[list[Reply]]:
            return await asyncio.gather(*(episode(self.agent, slots, n, prompt) for n, prompt in enumerate(prompts)))

        before, began = self.reused(), time.perf_counter()
        played = asyncio.run(episodes())
        speed = len(prompts) * TURNS * TURN_TOKENS / (time.perf_counter() - began)
        reused = self.reused() - before
        known = [len(reply.prompt_token_ids) + reply.token_count - 1 for said in played for reply in said[:-1]]
        return speed, reused / sum(known), reused / sum(tokens // BLOCK * BLOCK for tokens in known)


async def episode(agent: Agent, slots: asyncio.Semaphore, seed: int, prompt: list[int]) -> list[Reply]:
    heard = Message("user", text(prompt[:30]))
    messages: tuple[Message, ...] = (Message("user", text(prompt)),)
    said = []
    async with slots:
        for turn in range(TURNS):
            said.append(await agent.reply(Turn("seat", "state", messages, (), TURN_TOKENS), TURNS * seed + turn))
            messages += (Message("assistant", said[-1].text, said[-1]), heard)
    return said


def text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def engines(repetitions: int) -> None:
    if find_spec("vllm") is None:
        print("vLLM in process and vLLM's server are measured where vLLM is installed: make vllm")
        return
    # Before vLLM is imported: its processes are to have as many threads as this one, and no words of their own.
    os.environ |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "NO_PROXY": "127.0.0.1"}
    from turnwise.agents.server_agent import Server, TokenServerAgent
    from turnwise.agents.vllm_agent import VLLMAgent, VLLMEngine
    from turnwise.agents.vllm_server import VLLMServer

    disable_progress_bar()
    model, tokenizer = tiny()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        starting = pool.submit(VLLMServer.start, folder, max_running=max(RUNNING))
        with VLLMEngine.load(folder, max_running=max(RUNNING)) as vllm, starting.result() as server:
            engine = TransformersEngine(model, tokenizer, max_running=max(RUNNING), prefix_tokens=vllm.cache_tokens)
            connection = Server(server.url, server.model, concurrency=max(RUNNING))
            compare(
                {
                    "transformers": Contender(TransformersAgent(engine), lambda: engine.prefix_tokens_reused),
                    "vLLM": Contender(VLLMAgent(vllm), lambda: vllm.prefix_tokens_reused),
                    "vLLM server": Contender(TokenServerAgent(connection, tokenizer), partial(cache_hits, server.url)),
                },
                repetitions,
            )


def compare(contenders: dict[str, Contender], repetitions: int) -> None:
    for contender in contenders.values():
        contender.play(8, repetitions)
    print("running  engine         tok/s   ratio   prompt tokens reused, of an ideal cache's: by token   by block")
    for running in RUNNING:
        rounds = [[one.play(running, number) for one in contenders.values()] for number in range(repetitions)]
        results = [
            [statistics.median(cells) for cells in zip(*plays, strict=True)] for plays in zip(*rounds, strict=True)
        ]
        for name, (speed, of_tokens, of_blocks) in zip(contenders, results, strict=True):
            blocks = "" if name == "transformers" else f"{of_blocks:11.1%}"
            ratio = speed / results[0][0]
            print(f"{running:7}  {name:12} {speed:7.0f} {ratio:7.2f} {of_tokens:53.1%}{blocks}", flush=True)


def cache_hits(url: str) -> int:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))


PARTS = {"batches": batches, "reuse": reuse, "sharing": sharing, "engines": engines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for place, part in enumerate(arguments.only or PARTS):
        torch.manual_seed(0)
        print("\n" * bool(place), end="")
        PARTS[part](arguments.repetitions)


if __name__ == "__main__":
    main()
