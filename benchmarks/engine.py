"""Times the transformers engine against plain `model.generate` with a static batch, and prefix sharing against none.

    python benchmarks/engine.py

The model is a random Qwen2 of 0.7 million parameters in float32, the prompts are 60 to 300 random tokens, and both
sides sample at temperature 1. "equal" replies have 64 tokens; "mixed" ones 8 to 120, where `generate` goes on to the
longest of its batch and only the tokens asked for count. Each cell is the median over interleaved repetitions of this
one run; four times as many replies are asked for as run at once. The "rollouts" are 16 samples of 32 tokens for each of
8 growing prefixes of a prompt of 480 tokens, all asked for at once. Take the ratios, and leave the tokens per second to
the machine they were taken on.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from turnwise.agents.transformers_agent import TransformersEngine

VOCABULARY = 400
WAVES = 4
SAMPLES = 16
STEPS = 8
STEP_TOKENS = 60
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
    words = {str(token): token for token in range(VOCABULARY)} | {"<end>": VOCABULARY}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, tokenizer = tiny()
    print("running  replies   engine tok/s   generate tok/s   ratio")
    for running in (1, 16, 128):
        engine = TransformersEngine(model, tokenizer, max_running=running)
        for mixed in (False, True):
            asked = requests(WAVES * running, mixed)
            ours, theirs = versus(
                partial(sample, engine, asked), partial(generate, model, asked, running), arguments.repetitions
            )
            tokens = sum(count for _, count in asked)
            label = "mixed" if mixed else "equal"
            print(f"{running:7}  {label:7} {tokens / ours:14.0f} {tokens / theirs:16.0f} {theirs / ours:7.2f}")
    print("\nrunning  4-turn episodes: prefix reuse, speed against none   prompt tokens reused")
    for running in (1, 16, 128):
        asked = requests(max(4, running), mixed=False)
        plain = TransformersEngine(model, tokenizer, max_running=running, prefix_tokens=0)
        keeping = TransformersEngine(model, tokenizer, max_running=running)
        ours, theirs = versus(partial(converse, keeping, asked), partial(converse, plain, asked), arguments.repetitions)
        share = keeping.prefix_tokens_reused / keeping.prompt_tokens
        print(f"{running:7}  {theirs / ours:47.2f} {share:22.0%}")
    print("\nrunning  rollouts: prefix sharing, speed against none   prompt tokens reused   by an ideal cache")
    asked, ideal = rollouts()
    for running in (16, 128):
        plain = TransformersEngine(model, tokenizer, max_running=running, prefix_tokens=0)
        keeping = TransformersEngine(model, tokenizer, max_running=running)
        ours, theirs = versus(partial(sample, keeping, asked), partial(sample, plain, asked), arguments.repetitions)
        share = keeping.prefix_tokens_reused / keeping.prompt_tokens
        print(f"{running:7}  {theirs / ours:43.2f} {share:22.1%} {ideal:19.1%}")


if __name__ == "__main__":
    main()
