"""The shipped models load anywhere, are small, and can do what they are shipped for."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from turnwise.agents.tiny import LONG, ROUTER, SHORT
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.environments.arithmetic import arithmetic, generate
from turnwise.environments.episode import Episode
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.gated import Gated
from turnwise.protocols.graph import GraphProtocol
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.solo import Solo
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl import tiny_models
from turnwise.rl.episode_store import encode
from turnwise.rl.rollout import Team, play
from turnwise.rl.sft import SFTSettings
from turnwise.rl.summary import Summary, summarise
from turnwise.rl.tiny_models import build_tokenizer

LONG_ALONE, SHORT_ALONE = Solo("long", answer_after="</think>"), Solo("short", stops=("</answer>",))


@pytest.fixture(scope="module")
def team() -> Team:
    folders = {"long": LONG, "short": SHORT, "solver": ROUTER}
    agents = {seat: TransformersAgent(TransformersEngine.load(path), temperature=0.6) for seat, path in folders.items()}
    return agents | {"router": agents["solver"]}


Played = Callable[..., list[Episode]]


@pytest.fixture(scope="module")
def played() -> Iterator[Played]:
    """The episodes of a protocol, a team and so many problems."""
    with MathGrader() as grader:

        def played(
            protocol: GraphProtocol, team: Team, count: int = 60, problem_set: str = "mixed", concurrency: int = 64
        ) -> list[Episode]:
            environment = arithmetic(grader, problem_set=problem_set, count=count, seed=11)
            return play(protocol, team, environment, seed=3, concurrency=concurrency)

        yield played


@pytest.fixture(scope="module")
def long_alone(played: Played, team: Team) -> Summary:
    return summarise(played(LONG_ALONE, team))


def test_they_are_at_most_8_mebibytes_in_all_and_plain_transformers_checkpoints() -> None:
    assert sum(file.stat().st_size for file in LONG.parent.rglob("*") if file.is_file()) <= 8 * 2**20
    questions = [problem.question for problem, _ in zip(generate("test"), range(200), strict=False)]
    for folder in (LONG, SHORT, ROUTER):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        exact = build_tokenizer()
        assert model.get_input_embeddings().num_embeddings == len(exact)
        # AutoTokenizer splits texts by Qwen's rules; on what these models read, that comes to the same.
        for question in questions:
            ids = tokenizer(question, add_special_tokens=False)["input_ids"]
            assert ids == exact(question, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == question


def test_thinking_is_right_and_long_and_answering_at_once_is_right_on_the_easiest_level_only(
    team: Team, played: Played, long_alone: Summary
) -> None:
    short_alone = summarise(played(SHORT_ALONE, team))
    assert long_alone.accuracy >= 0.9
    assert short_alone.accuracy <= 0.6
    assert long_alone.tokens > 8 * short_alone.tokens
    easiest = [e for e in played(SHORT_ALONE, team, problem_set="easy") if e.transcript.problem.level == 1]
    assert summarise(easiest).accuracy >= 0.9


def test_together_they_are_right_and_shorter(team: Team, played: Played, long_alone: Summary) -> None:
    together = summarise(played(LongShort(), team))
    assert together.accuracy >= 0.88
    assert together.tokens < 0.8 * long_alone.tokens
    assert set(together.seat_tokens) == {"long", "short"}


def test_the_router_reaches_both_modes_and_opens_the_gate(team: Team, played: Played) -> None:
    agent = TransformersAgent(TransformersEngine.load(ROUTER))
    routed = summarise(played(Thinkless(), {"solver": agent}, count=120))
    assert routed.think_share == pytest.approx(0.5, abs=0.15)
    assert summarise(played(Thinkless(mode="think"), team)).accuracy >= 0.9
    gated = played(Gated(), {**team, "router": agent})
    opened = {episode.transcript.steps[0].reply.stop: episode for episode in gated}
    assert set(opened) == {"<short>", "<think>"}
    assert [step.seat for step in opened["<short>"].transcript.steps] == ["router", "short"]
    assert [step.seat for step in opened["<think>"].transcript.steps[:3]] == ["router", "long", "short"]


def test_the_same_tokens_at_any_concurrency(team: Team, played: Played) -> None:
    """Text, ids and grades are identical, log-probabilities to 1e-5: products round differently in larger batches."""
    one, many = played(LongShort(), team, 12, concurrency=1), played(LongShort(), team, 12, concurrency=64)
    for alone, batched in zip(one, many, strict=True):
        assert alone.grade == batched.grade
        for mine, other in zip(alone.transcript.steps, batched.transcript.steps, strict=True):
            assert mine.reply.token_ids == other.reply.token_ids
            assert mine.reply.prompt_token_ids == other.reply.prompt_token_ids
            assert mine.reply.log_probabilities == pytest.approx(other.reply.log_probabilities, abs=1e-5)


def test_bit_by_bit_the_same_where_the_engines_remember_nothing(team: Team, played: Played) -> None:
    def from_cold() -> list[bytes]:
        for agent in team.values():
            assert isinstance(agent, TransformersAgent)
            agent.engine.version = 0  # which forgets the keys and values of earlier prompts
        return [encode(episode) for episode in played(LongShort(), team, 8, concurrency=1)]

    assert from_cold() == from_cold()


def test_they_are_rebuilt_by_one_command_which_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_models, "BASE", SFTSettings(steps=3, batch_size=4, learning_rate=1e-3))
    monkeypatch.setattr(tiny_models, "ROLE", SFTSettings(steps=2, batch_size=4, learning_rate=1e-3))
    app = typer.Typer()
    app.command()(tiny_models.main)
    done = CliRunner().invoke(app, [str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    before = (tmp_path / "out" / "long" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out" / "long")
    (tmp_path / "out" / "checkpoints" / "long.pt").unlink()
    assert CliRunner().invoke(app, [str(tmp_path / "out")]).exit_code == 0
    assert (tmp_path / "out" / "long" / "model.safetensors").read_bytes() == before
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "router")
    assert model.dtype == torch.float16
