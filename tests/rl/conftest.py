"""Dialogues written by hand, and a model that is small, random and exact."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from turnwise.environments.environment import Grade, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript

Dialogue = Callable[..., Episode]
MiniModel = Callable[..., PreTrainedModel]

SEATS = {"solver": 28, "router": 29, "long": 30, "short": 31}
QUESTION = (1, 2, 3)


@pytest.fixture(scope="session")
def dialogue() -> Dialogue:
    """An episode whose turns are given as (seat, state, said ids, or also the tag that they stopped at).

    A seat reads a token of its own, the question and all that was said before, so that each of its prompts continues
    the last one; with `forgetful`, of what was said it reads the last turn alone.
    """

    def write(
        *turns: tuple[str, str, tuple[int, ...]] | tuple[str, str, tuple[int, ...], str],
        problem: str = "p",
        sample: int = 0,
        right: bool = True,
        forgetful: bool = False,
        log_probability: float = -0.5,
    ) -> Episode:
        steps, before = list[Step](), list[tuple[int, ...]]()
        for seat, state, said, *stop in turns:
            read = [token for turn in (before[-1:] if forgetful else before) for token in turn]
            reply = Reply(
                "", len(said), "stop" if stop else "end", stop[0] if stop else None, said,
                (log_probability,) * len(said), (SEATS[seat], *QUESTION, *read), model="by hand",
            )  # fmt: skip
            steps.append(Step(seat, state, reply))
            before.append(said)
        transcript = Transcript(Problem(problem, "1 + 1?", "2"), tuple(steps))
        return Episode(transcript, sample, 0, Grade(Outcome.RIGHT if right else Outcome.WRONG))

    return write


@pytest.fixture(scope="session")
def mini_model() -> MiniModel:
    """A Qwen2 of double precision, 32 tokens and 5,000 weights."""

    def build(seed: int = 0, dropout: float = 0.0) -> PreTrainedModel:
        config = Qwen2Config(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.3,
            attention_dropout=dropout,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Qwen2ForCausalLM(config)
        # transformers' own norms compute in single precision, whatever the model's.
        for layer in model.model.layers:
            layer.input_layernorm, layer.post_attention_layernorm = (
                torch.nn.RMSNorm(16, config.rms_norm_eps) for _ in "12"
            )
        model.model.norm = torch.nn.RMSNorm(16, config.rms_norm_eps)
        return model.double().eval()

    return build
