import asyncio
import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from turnwise.agents.transformers_agent import TransformersEngine
from turnwise.agents.transformers_cache import Ids, PrefixStore, Stored
from turnwise.environments.transcript import Reply

RANDOM = np.random.default_rng(0).integers(3, 300, 200).tolist()
PROMPT, MORE, OTHER, REST = RANDOM[:40], RANDOM[40:64], RANDOM[70:100], RANDOM[100:130]


def ids(*blocks: int, size: int = 20) -> Ids:
    """Each of `blocks`, `size` times in a row."""
    return np.repeat(np.array(blocks, dtype=np.int32), size)


def stored(sequence: Ids) -> Stored:
    """Keys and values from which one can read their tokens."""
    states = torch.from_numpy(sequence)[:, None, None]
    return [(states, -states)]


def found(store: PrefixStore, prompt: Ids) -> int:
    """How many tokens of `prompt` are kept, once they are known to be its own."""
    layers = store.longest(prompt)
    for keys, values in layers:
        assert keys.flatten().tolist() == prompt[: len(keys)].tolist() == (-values).flatten().tolist()
    return len(layers[0][0]) if layers else 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (ids(1, 2, 3), 40),
        (ids(1, 2), 39),
        (ids(1, 2)[:30], 29),
        (ids(1, 3), 20),
        (ids(1, 0, 5), 20),
        (np.append(ids(1, 2)[:-1], np.int32(9)), 39),
        (np.append(ids(1)[:16], np.int32(9)), 16),
        (np.append(ids(1)[:15], np.int32(9)), 0),
        (ids(1)[:16], 0),
        (ids(3), 0),
        (ids(1)[:1], 0),
    ],
)
def test_the_longest_common_prefix_is_found(prompt: Ids, expected: int) -> None:
    store = PrefixStore(100)
    assert found(store, prompt) == 0
    store.put(ids(1, 2), stored(ids(1, 2)))
    assert found(store, prompt) == expected


def test_the_longest_of_many_is_found() -> None:
    # Tokens of one to three bytes: the order in which they are kept is not that of the numbers.
    random = np.random.default_rng(0)
    store = PrefixStore(1_000_000)
    kept: list[list[int]] = []
    for _ in range(300):
        prompt = ids(*random.choice([1, 2, 255, 256, 65_536], random.integers(1, 7)))[: random.integers(1, 120)]
        sequence = prompt.tolist()
        expected = max(
            (next(n for n in range(len(sequence), -1, -1) if other[:n] == sequence[:n]) for other in kept), default=0
        )
        expected = min(expected, len(sequence) - 1)
        assert found(store, prompt) == (expected if expected >= 16 else 0)
        store.put(prompt, stored(prompt))
        kept.append(sequence)


def test_the_least_recently_used_leave() -> None:
    store = PrefixStore(119)
    for block in (1, 2):
        store.put(ids(block, 7), stored(ids(block, 7)))
    assert found(store, ids(1, 7, 7)) == 40
    store.put(ids(3, 7), stored(ids(3, 7)))
    assert [found(store, ids(block, 7, 7)) for block in (1, 2, 3)] == [40, 0, 40]


def test_what_is_put_again_is_used() -> None:
    store = PrefixStore(119)
    for sequence in (ids(1, 7), ids(3, 7), ids(1, 7)[:30], ids(4, 7)):
        store.put(sequence, stored(sequence))
    assert [found(store, ids(block, 7, 7)) for block in (1, 3, 4)] == [40, 0, 40]


def test_a_prefix_of_what_is_kept_takes_no_room() -> None:
    store = PrefixStore(100)
    for blocks in ((1,), (1, 2), (1, 2, 3), (1, 2), (8,), (9,)):
        store.put(ids(*blocks), stored(ids(*blocks)))
    assert [found(store, ids(*blocks, 7)) for blocks in ((1, 2, 3), (8,), (9,))] == [60, 20, 20]


@pytest.fixture
def engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> TransformersEngine:
    return TransformersEngine(copy.deepcopy(model), tokenizer)


@pytest.fixture
def plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> TransformersEngine:
    return TransformersEngine(model, tokenizer, prefix_tokens=0)


async def ask(engine: TransformersEngine, prompt: list[int], seed: int = 0, max_tokens: int = 6) -> Reply:
    return await engine.sample(prompt, stops=(), max_tokens=max_tokens, seed=seed, temperature=float(seed > 0))


def ask_all(engine: TransformersEngine, prompts: Sequence[list[int]]) -> list[Reply]:
    """Samples of all prompts at once, of the first one greedily."""

    async def run() -> list[Reply]:
        return await asyncio.gather(*(ask(engine, prompt, seed) for seed, prompt in enumerate(prompts)))

    return asyncio.run(run())


def assert_alike(replies: Sequence[Reply], expected: Sequence[Reply]) -> None:
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in expected]
    for reply, other in zip(replies, expected, strict=True):
        np.testing.assert_allclose(reply.log_probabilities, other.log_probabilities, atol=2e-5)


def passes(engine: TransformersEngine) -> list[tuple[int, ...]]:
    """The shapes [rows, queries] of the forward passes from now on."""
    shapes: list[tuple[int, ...]] = []
    engine.model.register_forward_pre_hook(
        lambda module, inputs, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_samples_of_one_prompt_compute_it_once(engine: TransformersEngine, plain: TransformersEngine) -> None:
    shapes = passes(engine)
    replies = ask_all(engine, [PROMPT] * 16)
    assert shapes[:2] == [(1, 40), (15, 1)]
    assert (engine.prompt_tokens, engine.prefix_tokens_reused) == (640, 585)
    assert_alike(replies, ask_all(plain, [PROMPT] * 16))
    assert len({reply.token_ids for reply in replies}) == 16
    assert (plain.prompt_tokens, plain.prefix_tokens_reused) == (640, 0)


# Of 40, 24 and 30 new tokens; the rows that compute none of these compute one.
GROWING = [PROMPT] * 8 + [PROMPT + MORE] * 8 + [PROMPT + MORE + REST] * 8


@pytest.mark.parametrize(("max_running", "computed"), [(64, 94 + 23), (4, 94 + 21), (1, 94 + 21)])
def test_growing_prompts_compute_each_part_once(
    engine: TransformersEngine, plain: TransformersEngine, max_running: int, computed: int
) -> None:
    engine.max_running = max_running
    assert_alike(ask_all(engine, GROWING), ask_all(plain, GROWING))
    assert (engine.prompt_tokens, engine.prefix_tokens_reused) == (1584, 1584 - computed)


def test_branches_wait_for_what_they_share(engine: TransformersEngine, plain: TransformersEngine) -> None:
    shapes = passes(engine)
    prompts = [PROMPT + MORE, PROMPT + OTHER, PROMPT + MORE, PROMPT + OTHER, REST, PROMPT + MORE[:10]]
    replies = ask_all(engine, prompts)
    # A branch and the prompt apart; then the other branch, and those who share the first; then who shares the other.
    assert shapes[:4] == [(2, 64), (1, 30), (2, 1), (1, 1)]
    assert (engine.prompt_tokens, engine.prefix_tokens_reused) == (348, 221)
    assert_alike(replies, ask_all(plain, prompts))


def test_running_row_is_shared(engine: TransformersEngine, plain: TransformersEngine) -> None:
    async def run() -> list[Reply]:
        first = asyncio.create_task(ask(engine, PROMPT, 1, 20))
        for _ in range(5):
            await asyncio.sleep(0)
        others = await asyncio.gather(ask(engine, PROMPT, 2), ask(engine, PROMPT + MORE, 3))
        assert not first.done()
        assert (engine.prompt_tokens, engine.prefix_tokens_reused) == (144, 79)
        return [await first, *others]

    shared = asyncio.run(run())
    assert_alike([shared[0]], [asyncio.run(ask(plain, PROMPT, 1, 20))])
    assert_alike(shared[1:], [asyncio.run(ask(plain, PROMPT, 2)), asyncio.run(ask(plain, PROMPT + MORE, 3))])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_cancelled_row_leaves_what_others_share(
    engine: TransformersEngine, plain: TransformersEngine, steps: int
) -> None:
    """Cancelled before it joins, and after."""

    async def run() -> list[Reply]:
        tasks = [asyncio.create_task(ask(engine, PROMPT, seed)) for seed in range(4)]
        for _ in range(steps):
            await asyncio.sleep(0)
        tasks[0].cancel()
        late = asyncio.create_task(ask(engine, PROMPT, 4))
        replies = await asyncio.gather(*tasks, late, return_exceptions=True)
        assert isinstance(replies[0], asyncio.CancelledError)
        return [reply for reply in replies[1:] if isinstance(reply, Reply)]

    replies = asyncio.run(run())
    assert engine.prompt_tokens - engine.prefix_tokens_reused == 40 + engine.prompt_tokens // 40 - 1
    assert_alike(replies, ask_all(plain, [PROMPT] * 5)[1:])


def test_rows_of_an_older_version_are_not_shared(engine: TransformersEngine) -> None:
    async def run() -> None:
        old = asyncio.create_task(ask(engine, PROMPT, 1, 20))
        for _ in range(5):
            await asyncio.sleep(0)
        engine.version = 1
        new = asyncio.create_task(ask(engine, PROMPT, 2, 40))
        for _ in range(3):
            await asyncio.sleep(0)
        assert engine.prefix_tokens_reused == 0
        reply = await old
        # Shares the prompt with the new row, but the reply with nobody.
        await ask(engine, [*PROMPT, *reply.token_ids], 3)
        assert engine.prefix_tokens_reused == 40
        assert not new.done()
        assert (reply.version, (await new).version) == (0, 1)

    asyncio.run(run())


def test_prompt_beyond_the_limit_is_shared_with_nobody(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    for limit, reused, first in ((39, 0, (4, 40)), (40, 3 * 39, (1, 40))):
        engine = TransformersEngine(copy.deepcopy(model), tokenizer, prefix_tokens=limit)
        shapes = passes(engine)
        ask_all(engine, [PROMPT] * 4)
        assert (shapes[0], engine.prefix_tokens_reused) == (first, reused)


def test_more_prompts_than_are_kept_are_all_answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, plain: TransformersEngine
) -> None:
    engine = TransformersEngine(model, tokenizer, prefix_tokens=45)
    prompts = [PROMPT, OTHER, REST] * 4
    assert_alike(ask_all(engine, prompts), ask_all(plain, prompts))
    assert 0 < engine.prefix_tokens_reused < 3 * (39 + 29 + 29)


def test_what_exceeds_the_limit_drives_nothing_out(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(model, tokenizer, prefix_tokens=45)
    for prompt in (PROMPT, RANDOM[50:100], OTHER + REST, PROMPT):
        ask_all(engine, [prompt])
    assert engine.prefix_tokens_reused == 39
