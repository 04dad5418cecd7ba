import asyncio
import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from turnwise.agents.engine import StopMatcher
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.agents.transformers_engine import load_tokenizer
from turnwise.agents.transformers_sampling import Sampler, exponential
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Message, Reply, Turn


def turn(index: int, max_tokens: int = 0, stops: tuple[str, ...] = (), *, prefill: str = "") -> Turn:
    """Questions and budgets of many lengths."""
    question = Message("user", f"what is {index} plus {index * index}? " * (1 + index % 4))
    return Turn("seat", "state", (question,), stops, max_tokens or 6 + 5 * (index % 5), prefill)


def play(agent: TransformersAgent, turns: Sequence[Turn], seed: int = 0) -> list[Reply]:
    async def run() -> list[Reply]:
        return list(await asyncio.gather(*(agent.reply(asked, seed + n) for n, asked in enumerate(turns))))

    return asyncio.run(run())


def alone(agent: TransformersAgent, turns: Sequence[Turn]) -> list[Reply]:
    return [asyncio.run(agent.reply(asked, n)) for n, asked in enumerate(turns)]


def sampled(replies: Sequence[Reply]) -> list[tuple[int, ...]]:
    return [reply.token_ids for reply in replies]


def forward(model: PreTrainedModel, reply: Reply) -> torch.Tensor:
    """The logits from which a plain forward pass would draw each token of the reply."""
    with torch.no_grad():
        logits = model(torch.tensor([reply.prompt_token_ids + reply.token_ids])).logits[0]
    return logits[len(reply.prompt_token_ids) - 1 : -1]


def log_probabilities(logits: torch.Tensor, reply: Reply) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, torch.tensor(reply.token_ids)[:, None])[:, 0]


def row_counts(model: PreTrainedModel) -> list[int]:
    """The number of rows of each forward pass from now on."""
    counts: list[int] = []
    model.register_forward_pre_hook(
        lambda module, inputs, named: counts.append(len(named["input_ids"])), with_kwargs=True
    )
    return counts


@pytest.fixture
def own_model(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model)


@pytest.fixture
def engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> TransformersEngine:
    return TransformersEngine(model, tokenizer)


@pytest.fixture
def agent(engine: TransformersEngine) -> TransformersAgent:
    return TransformersAgent(engine)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_is_generate(own_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, attention: str) -> None:
    own_model.set_attn_implementation(attention)
    agent = TransformersAgent(TransformersEngine(own_model, tokenizer), temperature=0)
    for index, reply in enumerate(play(agent, [turn(index) for index in range(12)])):
        ids = torch.tensor([reply.prompt_token_ids])
        expected = own_model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=turn(index).max_tokens
        )
        assert reply.token_ids == tuple(expected[0, ids.shape[1] :].tolist())
        expected_logs = log_probabilities(forward(own_model, reply), reply)
        torch.testing.assert_close(torch.tensor(reply.log_probabilities), expected_logs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.3, 0.5)])
def test_log_probabilities_are_those_of_the_distribution_sampled_from(
    engine: TransformersEngine, temperature: float, top_p: float
) -> None:
    agent = TransformersAgent(engine, temperature=temperature, top_p=top_p)
    for reply in play(agent, [turn(index) for index in range(8)]):
        logits = forward(engine.model, reply) / temperature
        for row in logits:
            ordered = row.softmax(-1).sort(descending=True)
            cut = int((ordered.values.cumsum(-1) < top_p).sum()) + 1
            row[ordered.indices[cut:]] = -torch.inf
        expected = log_probabilities(logits, reply)
        torch.testing.assert_close(torch.tensor(reply.log_probabilities), expected, atol=1e-4, rtol=0)


def test_sampling_is_the_same_alone_together_and_late(agent: TransformersAgent) -> None:
    turns = [turn(index) for index in range(16)]

    async def late() -> list[Reply]:
        tasks = []
        for n, asked in enumerate(turns):
            tasks.append(asyncio.create_task(agent.reply(asked, n)))
            for _ in range(n % 3):
                await asyncio.sleep(0)
        return list(await asyncio.gather(*tasks))

    reference = alone(agent, turns)
    for replies in (play(agent, turns), asyncio.run(late())):
        assert sampled(replies) == sampled(reference)
        for reply, expected in zip(replies, reference, strict=True):
            # Not bit for bit: matrix products round differently in batches of different sizes.
            np.testing.assert_allclose(reply.log_probabilities, expected.log_probabilities, atol=2e-5)


def test_agents_of_different_temperatures_share_a_batch(engine: TransformersEngine) -> None:
    agents = [TransformersAgent(engine, temperature=t, top_p=p) for t, p in ((0, 1), (1, 1), (0.5, 0.9), (2, 1))]

    async def together() -> list[Reply]:
        return list(await asyncio.gather(*(agent.reply(turn(7), 3) for agent in agents)))

    assert sampled(asyncio.run(together())) == [sampled(play(agent, [turn(7)], 3))[0] for agent in agents]


def test_seeds_decide(agent: TransformersAgent) -> None:
    first, again = sampled(play(agent, [turn(4)] * 8)), sampled(play(agent, [turn(4)] * 8))
    assert first == again
    assert len(set(first)) == 8


def test_reply_is_complete(engine: TransformersEngine) -> None:
    engine.version = 7
    asked = turn(3, 9, prefill="so ")
    reply = play(TransformersAgent(engine, name="short"), [asked])[0]
    assert reply.prompt_token_ids == tuple(engine.template.prompt(asked))
    assert (reply.token_count, len(reply.token_ids), len(reply.log_probabilities)) == (9, 9, 9)
    assert (reply.finish, reply.stop, reply.model, reply.version) == ("length", None, "short", 7)
    assert reply.tokenizer == engine.template.fingerprint
    assert reply.text == engine.tokenizer.decode(reply.token_ids)


def emitting(model: PreTrainedModel, token: int) -> PreTrainedModel:
    """A model that says `token` wherever it is greedy."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.zero_()  # leaves the logits to the bias
        other.lm_head.bias = torch.nn.Parameter(torch.zeros(len(other.lm_head.weight)))
        other.lm_head.bias[token] = 5.0
    return other


def test_end_of_sequence_ends_and_stays_out_of_the_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = TransformersEngine(emitting(model, tokenizer.eos_token_id), tokenizer)
    reply = play(TransformersAgent(engine, temperature=0), [turn(1)])[0]
    assert (reply.finish, reply.text, reply.token_ids) == ("end", "", (tokenizer.eos_token_id,))


def test_tag_that_is_a_token_stops_and_stays_in_the_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    tag = tokenizer.convert_tokens_to_ids("</think>")
    agent = TransformersAgent(TransformersEngine(emitting(model, tag), tokenizer), temperature=0)
    reply = play(agent, [turn(1, 5, ("</answer>", "</think>"))])[0]
    assert (reply.finish, reply.stop, reply.text, reply.token_ids) == ("stop", "</think>", "</think>", (tag,))
    control = play(agent, [turn(1, 1, ("<short>", "<think>"))])[0]
    assert (control.finish, control.text) == ("length", "</think>")


def test_tag_that_spans_tokens_stops(agent: TransformersAgent) -> None:
    decode = agent.engine.tokenizer.decode
    whole = play(agent, [turn(8, 60)])[0]
    pieces = [decode([token]) for token in whole.token_ids]
    place = next(
        n
        for n in range(5, 59)
        if (pieces[n] + pieces[n + 1]).isascii()
        and pieces[n][-1] + pieces[n + 1][0] not in decode(whole.token_ids[: n + 1])
    )
    tag = pieces[place][-1] + pieces[place + 1][0]
    reply = play(agent, [turn(8, 60, ("</answer>", tag))])[0]
    assert (reply.finish, reply.stop, reply.token_ids) == ("stop", tag, whole.token_ids[: place + 2])
    assert tag in reply.text


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("so it is</answer> then", ("</answer>",), "so it is</answer>"),
        ("it </rethink></answer>", ("</answer>", "</rethink>"), "it </rethink>"),
        ("the answer is 5", ("swe",), "the answer"),
        ("é ü", ("ü",), "é ü"),
        ("so  then", (" ",), "so "),
        ("so </think> then", ("</think>", "then"), "so </think>"),
        ("nothing", ("</answer>",), "nothing"),
    ],
)
def test_stop_matcher(tokenizer: PreTrainedTokenizerFast, text: str, stops: tuple[str, ...], expected: str) -> None:
    matcher = StopMatcher(tokenizer, stops)
    ids = tokenizer(text)["input_ids"]
    end = next((n for n in range(1, len(ids) + 1) if matcher.match(ids[:n])), len(ids))
    assert tokenizer.decode(ids[:end]) == expected


def test_of_two_tags_in_one_token_the_first_wins(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(" answer")["input_ids"]
    assert len(ids) == 1
    assert StopMatcher(tokenizer, ("swer", "ans")).match(ids) == "ans"


def test_control_token_must_be_one_token(agent: TransformersAgent) -> None:
    assert play(agent, [turn(1, 1, ("<short>", "<think>"))])[0].token_count == 1
    with pytest.raises(InputError, match=r"\['<long>'\] of seat 'seat' are not: call tokenizer.add_tokens"):
        play(agent, [turn(1, 1, ("<short>", "<long>"))])


def test_budget_is_cut_to_the_context(engine: TransformersEngine) -> None:
    async def ask(length: int) -> Reply:
        return await engine.sample([5] * length, stops=(), max_tokens=100, seed=0)

    reply = asyncio.run(ask(engine.context - 3))
    assert (reply.finish, reply.token_count) == ("length", 3)
    for length in (0, engine.context):
        with pytest.raises(ValueError, match=f"from 1 to 511 tokens; this one has {length}") as failure:
            asyncio.run(ask(length))
        assert not isinstance(failure.value, InputError)


def test_queue_beyond_the_running_rows(own_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [turn(index) for index in range(9)]
    few = TransformersAgent(TransformersEngine(own_model, tokenizer, max_running=2))
    reference = alone(few, turns)
    counts = row_counts(own_model)
    assert sampled(play(few, turns)) == sampled(reference)
    assert max(counts) == 2


def test_cancelled_request_leaves_the_batch(own_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    agent = TransformersAgent(TransformersEngine(own_model, tokenizer))
    reference = play(agent, [turn(index, 30) for index in range(4)])
    counts = row_counts(own_model)

    async def run() -> list[Reply | BaseException]:
        tasks = [asyncio.create_task(agent.reply(turn(index, 30), index)) for index in range(4)]
        for _ in range(8):
            await asyncio.sleep(0)
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    replies = asyncio.run(run())
    assert isinstance(replies[1], asyncio.CancelledError)
    del replies[1], reference[1]
    assert sampled(replies) == sampled(reference)
    assert counts[5] == 4
    assert counts[-1] == 3


def dialogue(engine: TransformersEngine, seed: int) -> list[Reply]:
    """Eight four-turn dialogues at once, a partner's words between the turns."""
    agent = TransformersAgent(engine)

    async def episode(index: int) -> list[Reply]:
        messages, replies = turn(index).messages, []
        for n in range(4):
            reply = await agent.reply(Turn("seat", "state", messages, (), 6 + index), seed + 10 * index + n)
            replies.append(reply)
            messages += (Message("assistant", reply.text, reply), Message("assistant", " so it is."))
        return replies

    async def run() -> list[Reply]:
        return [reply for replies in await asyncio.gather(*map(episode, range(8))) for reply in replies]

    return asyncio.run(run())


def test_prefix_reuse_changes_nothing_but_the_work(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    keeping = TransformersEngine(model, tokenizer)
    plain = TransformersEngine(model, tokenizer, prefix_tokens=0)
    small = TransformersEngine(model, tokenizer, prefix_tokens=120)
    expected = dialogue(plain, 0)
    for engine in (keeping, small):
        replies = dialogue(engine, 0)
        assert sampled(replies) == sampled(expected)
        for reply, other in zip(replies, expected, strict=True):
            np.testing.assert_allclose(reply.log_probabilities, other.log_probabilities, atol=2e-5)
    assert plain.prefix_tokens_reused == 0 < small.prefix_tokens_reused < keeping.prefix_tokens_reused
    assert keeping.prefix_tokens_reused > 0.5 * keeping.prompt_tokens == 0.5 * plain.prompt_tokens


def test_new_version_forgets_the_old_weights(own_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(own_model, tokenizer)
    dialogue(engine, 0)
    with torch.no_grad():
        for parameter in own_model.parameters():
            parameter.mul_(0.9)
    engine.version += 1
    assert sampled(dialogue(engine, 0)) == sampled(dialogue(TransformersEngine(own_model, tokenizer), 0))


def test_model_in_training_samples_without_dropout_and_goes_on_training(
    own_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    for layer in own_model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    agent = TransformersAgent(TransformersEngine(own_model, tokenizer))
    expected = sampled(play(agent, [turn(5)]))
    own_model.train()
    assert sampled(play(agent, [turn(5)])) == expected
    assert own_model.training


def test_no_global_random_state_is_touched(agent: TransformersAgent) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    play(agent, [turn(1)])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_failure_reaches_every_request_and_the_engine_goes_on(
    own_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    agent = TransformersAgent(TransformersEngine(own_model, tokenizer, max_running=4))

    def fail(*_: object) -> None:
        raise MemoryError("too many rows")

    hook = own_model.register_forward_pre_hook(fail)

    async def run() -> list[Reply | BaseException]:
        return await asyncio.gather(*(agent.reply(turn(n), n) for n in range(6)), return_exceptions=True)

    assert [str(error) for error in asyncio.run(run())] == ["too many rows"] * 6
    hook.remove()
    assert len(play(agent, [turn(n) for n in range(6)])) == 6


def test_diverged_weights_are_named(own_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.no_grad():
        own_model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="its weights have diverged"):
        play(TransformersAgent(TransformersEngine(own_model, tokenizer)), [turn(1)])


def test_saved_model_is_loaded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, agent: TransformersAgent, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"holds no tokenizer\.json; call tokenizer.save_pretrained"):
        TransformersEngine.load(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = TransformersEngine.load(str(tmp_path))
    assert loaded.name == str(tmp_path)
    assert sampled(play(TransformersAgent(loaded), [turn(2)])) == sampled(play(agent, [turn(2)]))


def test_tokenizer_is_loaded_as_it_was_saved(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    Qwen2Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in ("what is 3 plus 9? the\n\nanswer...", "</think>\n12 <short>"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.chat_template, loaded.eos_token) == (tokenizer.chat_template, tokenizer.eos_token)


def test_bad_folders_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        TransformersEngine.load(tmp_path / "missing")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cannot load a model") as failure:
        TransformersEngine.load(tmp_path)
    assert "\n" not in str(failure.value)


def test_bad_settings_are_named(engine: TransformersEngine) -> None:
    for temperature, top_p in ((-1.0, 1.0), (1.0, 0.0), (1.0, 1.5)):
        with pytest.raises(InputError, match="temperature must be at least 0 and top_p within"):
            TransformersAgent(engine, temperature=temperature, top_p=top_p)
    with pytest.raises(InputError, match="max_running must be at least 1; got 0"):
        TransformersEngine(engine.model, engine.tokenizer, max_running=0)
    sliding = Qwen2Config(
        vocab_size=332, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, use_sliding_window=True, sliding_window=16, max_window_layers=1,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"needs full attention .* has DynamicSlidingWindowLayer"):
        TransformersEngine(Qwen2ForCausalLM(sliding), engine.tokenizer)


def test_exponential_noise() -> None:
    seeds, positions = torch.tensor([0, 1, -5]), torch.tensor([0, 0, 7])
    noise = exponential(seeds, positions, 3)
    # As computed from the definition of SplitMix64 with Python's integers.
    expected = [
        [2.1482413594, 0.5648032142, 0.0267894252],
        [0.2955599592, 0.0924704583, 0.3431883640],
        [0.5512770326, 0.3409424072, 0.2322065235],
    ]
    torch.testing.assert_close(noise, torch.tensor(expected))
    assert torch.equal(noise[1:], exponential(seeds[1:], positions[1:], 50)[:, :3])
    uniform = (-exponential(torch.arange(200) % 50, torch.arange(200), 500)).exp()
    counts = torch.histc(uniform, bins=20, min=0, max=1)
    # Chi-squared with 19 degrees of freedom: beyond 43.8 once in a thousand.
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 43.8


def test_sampler_draws_the_distribution() -> None:
    rows = 20_000
    sampler = Sampler(range(rows), [1.0] * rows, [1.0] * rows, torch.device("cpu"))
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    tokens, logs = sampler(probabilities.log().expand(rows, -1), torch.zeros(rows, dtype=torch.long))
    assert torch.bincount(tokens, minlength=4).div(rows).numpy() == pytest.approx([0.5, 0.0, 0.3, 0.2], abs=0.012)
    torch.testing.assert_close(logs, probabilities.log()[tokens])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_samples_what_the_cpu_does(
    own_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, agent: TransformersAgent
) -> None:
    on_gpu = TransformersAgent(TransformersEngine(own_model.to("cuda"), tokenizer))
    turns = [turn(index) for index in range(32)]
    for expected, reply in zip(play(agent, turns), play(on_gpu, turns), strict=True):
        assert reply.token_ids == expected.token_ids
        assert reply.log_probabilities == pytest.approx(expected.log_probabilities, abs=1e-4)
