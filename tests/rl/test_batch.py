"""A step's samples as flat tensors, and how they go through a model a few at a time."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from transformers import PreTrainedModel

from turnwise.agents.tiny import LONG, ROUTER, SHORT
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.environments.arithmetic import generate
from turnwise.environments.environment import Environment, Grade, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.protocols.gated import Gated
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.advantage import Sample
from turnwise.rl.batch import Batch, MicroBatch
from turnwise.rl.rollout import play
from turnwise.rl.trajectory import trajectories

Dialogue = Callable[..., Episode]
MiniModel = Callable[..., PreTrainedModel]


def samples(episode: Episode, seat: str, *advantages: float) -> list[Sample]:
    """What the seat said, with an advantage for each of its turns."""
    given = iter(advantages)
    return [Sample(found, tuple(islice(given, len(found.turns)))) for found in trajectories(episode, seat)]


def test_a_batch_as_literals(dialogue: Dialogue) -> None:
    """Of two dialogues, the longer with a mode chosen in its middle; the shorter one comes first."""
    long = dialogue(
        ("solver", "route", (7,), "<think>"), ("solver", "think", (8, 9)), ("short", "answer", (5, 5)),
        ("solver", "route", (6,), "<short>"), ("solver", "short", (4,)), log_probability=-0.25,
    )  # fmt: skip
    short = dialogue(("solver", "route", (7, 10)), sample=1)
    drawn = samples(long, "solver", 1, 2, 3, 4) + samples(short, "solver", -1)
    batch = Batch.of(drawn, control_states={"route"})
    assert batch.token_ids == ((28, 1, 2, 3, 7, 10), (28, 1, 2, 3, 7, 8, 9, 5, 5, 6, 4))
    assert batch.sequences.tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert batch.episodes.tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert batch.columns.tolist() == [4, 5, 4, 5, 6, 9, 10]
    assert batch.advantages.tolist() == [-1, -1, 1, 2, 2, 3, 4]
    assert batch.engine_log_probs.tolist() == [-0.5] * 2 + [-0.25] * 5
    assert batch.control.tolist() == [True, True, True, False, False, True, False]
    assert batch.modes == ("other", "other", "<think>", "<short>")
    assert batch.advantages.dtype == batch.engine_log_probs.dtype == torch.float32
    plain = Batch.of(drawn, dtype=torch.float64)
    assert not plain.control.any()
    assert plain.modes == ()
    assert plain.advantages.dtype == plain.engine_log_probs.dtype == torch.float64


def test_all_that_a_policy_said_in_an_episode_counts_together(dialogue: Dialogue) -> None:
    """In whichever seat, and in however many sequences."""
    turns = [("long", "think", (7, 8)), ("short", "answer", (9,)), ("long", "think", (10,))]
    first, second = (dialogue(*turns, sample=sample, forgetful=True) for sample in range(2))
    drawn = [s for e in (first, second) for s in samples(e, "long", 1, 1) + samples(e, "short", 1)]
    batch = Batch.of(drawn)
    assert len(batch.token_ids) == 6
    of = {
        name: number for number, name in zip(batch.episodes.tolist(), map(str, batch.sequences.tolist()), strict=True)
    }
    assert sorted(of.values()) == [0, 0, 0, 1, 1, 1]
    assert torch.bincount(batch.episodes).tolist() == [4, 4]


def test_no_samples_no_tokens() -> None:
    batch = Batch.of([])
    assert batch.token_ids == ()
    assert len(batch.sequences) == 0
    assert list(batch.micro_batches(4)) == []


def many(dialogue: Dialogue) -> Batch:
    """Eleven sequences of 5 to 15 tokens, in an order that is not that of their length."""
    episodes = [
        dialogue(
            ("solver", "a", tuple(range(1 + n * 7 % 5))), ("short", "b", (5,) * (n % 3)), ("solver", "a", (n, n + 1)),
            sample=n,
        )
        for n in range(11)
    ]  # fmt: skip
    return Batch.of([sample for n, e in enumerate(episodes) for sample in samples(e, "solver", n % 3 - 1, 0)])


@pytest.mark.parametrize("size", [1, 2, 4, 11, 100])
def test_micro_batches_hold_each_token_once_and_pad_on_the_right(dialogue: Dialogue, size: int) -> None:
    batch = many(dialogue)
    micros = list(batch.micro_batches(size))
    assert sorted(token for micro in micros for token in micro.tokens.tolist()) == list(range(len(batch.columns)))
    assert [len(micro.inputs) for micro in micros] == [min(size, 11 - start) for start in range(0, 11, size)]
    for micro in micros:
        assert micro.columns.tolist() == batch.columns[micro.tokens].tolist()
        numbers = batch.sequences[micro.tokens]
        assert (numbers - numbers.min()).tolist() == micro.rows.tolist()
        for row, inputs in enumerate(micro.inputs.tolist()):
            ids = batch.token_ids[int(numbers.min()) + row]
            assert inputs == [*ids, *[0] * (micro.inputs.shape[1] - len(ids))]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_sequences_are_left_out_where_every_token_may_be_skipped(dialogue: Dialogue, size: int) -> None:
    batch = many(dialogue)
    skip = batch.advantages == 0
    kept = {number for number, zero in zip(batch.sequences.tolist(), skip.tolist(), strict=True) if not zero}
    assert len(kept) == 7
    micros = list(batch.micro_batches(size, skip=skip))
    found = [token for micro in micros for token in micro.tokens.tolist()]
    assert found == [token for token, number in enumerate(batch.sequences.tolist()) if number in kept]
    assert skip[found].any()
    assert sum(len(micro.inputs) for micro in micros) == 7
    assert list(batch.micro_batches(size, skip=torch.ones_like(skip))) == []


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_log_probs_are_those_of_a_plain_forward_pass(
    dialogue: Dialogue, mini_model: MiniModel, temperature: float, size: int
) -> None:
    batch, model = many(dialogue), mini_model()
    with torch.no_grad():
        for micro in batch.micro_batches(size):
            logits = micro.logits(model, temperature)
            found = micro.log_probs(logits)
            for place, token in enumerate(micro.tokens.tolist()):
                ids, column = batch.token_ids[batch.sequences[token]], int(batch.columns[token])
                plain = model(torch.tensor([ids[:column]])).logits[0, -1] / temperature
                torch.testing.assert_close(logits[place], plain)
                torch.testing.assert_close(found[place], plain.log_softmax(-1)[ids[column]])


def test_half_precision_logits_become_single(dialogue: Dialogue, mini_model: MiniModel) -> None:
    (micro,) = many(dialogue).micro_batches(100)
    assert micro.logits(mini_model().to(torch.bfloat16), 1.0).dtype == torch.float32
    assert micro.logits(mini_model(), 1.0).dtype == torch.float64


# Against the engine that sampled


class AnyGrader(Grader):
    async def grade(self, problem: Problem, text: str) -> Grade:
        return Grade(Outcome.RIGHT)


@pytest.fixture(scope="module")
def engines() -> dict[Path, TransformersEngine]:
    return {path: TransformersEngine.load(path) for path in (LONG, SHORT, ROUTER)}


@pytest.mark.parametrize(
    ("protocol", "folders", "control"),
    [
        (Thinkless(short_tokens=30, think_tokens=60), {"solver": ROUTER}, 8),
        (LongShort(long_tokens=60, short_tokens=30), {"long": LONG, "short": SHORT}, 0),
        (Gated(LongShort(long_tokens=60, short_tokens=30)), {"router": ROUTER, "long": LONG, "short": SHORT}, 8),
    ],
    ids=["thinkless", "long-short", "gated"],
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_that_the_engine_reported(
    engines: dict[Path, TransformersEngine], protocol: ReasoningProtocol, folders: dict[str, Path], control: int,
    temperature: float,
) -> None:  # fmt: skip
    team = {seat: TransformersAgent(engines[path], temperature=temperature) for seat, path in folders.items()}
    environment = Environment("test", list(islice(generate("test"), 4)), AnyGrader())
    episodes = play(protocol, team, environment, samples=2, seed=1)
    chosen = 0
    for seat, path in folders.items():
        drawn = [Sample(t, (0.0,) * len(t.turns)) for e in episodes for t in trajectories(e, seat)]
        batch = Batch.of(drawn, control_states=protocol.control_states)
        said = [step.reply for e in episodes for step in e.transcript.steps if step.seat == seat]
        assert len(batch.columns) == sum(reply.token_count for reply in said) > 0
        chosen += int(batch.control.sum())
        for micro in batch.micro_batches(3):
            with torch.no_grad():
                found, other = (
                    micro.log_probs(micro.logits(engines[path].model, at)) for at in (temperature, 0.8 * temperature)
                )
            torch.testing.assert_close(found, batch.engine_log_probs[micro.tokens], rtol=0, atol=1e-4)
            assert (other - batch.engine_log_probs[micro.tokens]).abs().max() > 1e-3
    assert chosen == control


def test_wrong_shapes_are_refused(dialogue: Dialogue) -> None:
    batch = many(dialogue)
    with pytest.raises(TypeCheckError, match="columns"):
        replace(batch, columns=batch.columns[1:])
    with pytest.raises(TypeCheckError, match="control"):
        replace(batch, control=batch.columns)
    with pytest.raises(TypeCheckError, match="inputs"):
        MicroBatch(batch.columns, batch.columns, batch.columns, batch.columns)
