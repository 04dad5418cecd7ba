"""CPU time that one trained token costs in an optimiser step: turnwise against TRL and CoMLRL, on the same tokens.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/train_step.py [--repetitions 15] [--micro-batch 8]

A step learns from 64 completions, 8 to each of 8 arithmetic problems, which the long tiny model samples beforehand.
Their advantages are drawn at random, so none is zero and all must be trained. Timed is what follows sampling and
grading: log-probabilities, loss, backward, optimiser step. Where there are two policies, each learns from all 64. The
models have 0.7 million parameters, in float32, on one thread. Figures are process CPU time, and wall time, over the
completion tokens times the policies. The rows take turns, and each must have moved every tensor of its models' weights.

- turnwise: `Learner.update` of each policy.
- TRL: `training_step` of `GRPOTrainer`, which shuffles the completions and splits them into micro-batches, and then
  clipping, optimiser and scheduler as the trainer's loop calls them; the loop's callbacks and logging are left out. All
  completions are padded to one width, as by its own generation, and without Triton its head scores the padding too. It
  has one policy. Its loss is turnwise's.
- CoMLRL: `_drain_ready_buffers` of `MAGRPOTrainer` on full buffers, which is advantages, loss, backward and optimiser
  step of each agent, one sequence at a time whatever its settings. It has no clipping, ratio or scheduler, and leaves
  the last token of each completion untrained, which is counted as trained all the same. Its own generation would pad
  the completions of a problem to one length, and the padding would be trained; here it gets none.
"""

import argparse
import gc
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import transformers
from comlrl.trainers.reinforce import MAGRPOConfig, MAGRPOTrainer
from comlrl.trainers.reinforce.magrpo import NodeSample
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad

from turnwise.agents.tiny import LONG, SHORT
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.agents.transformers_engine import load_tokenizer
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.solo import Solo
from turnwise.rl.advantage import Sample, grpo
from turnwise.rl.learner import Learner, LearnerSettings
from turnwise.rl.rollout import play
from turnwise.rl.trajectory import trajectories

PROBLEMS, GROUP = 8, 8
LEARNING_RATE = 1e-6


class Row(NamedTuple):
    """Models, and what takes one optimiser step of each."""

    models: Sequence[PreTrainedModel]
    step: Callable[[], None]


def sampled() -> list[Sample]:
    """Problem by problem, `GROUP` each."""
    team = {"long": TransformersAgent(TransformersEngine.load(LONG))}
    with MathGrader() as grader:
        environment = arithmetic(grader, count=PROBLEMS)
        episodes = play(Solo("long", max_tokens=512), team, environment, samples=GROUP)
    rewards = torch.randn(len(episodes), generator=torch.Generator().manual_seed(0))
    advantages = grpo(rewards, torch.arange(PROBLEMS).repeat_interleave(GROUP)).tolist()
    said = [trajectory for episode in episodes for trajectory in trajectories(episode, "long")]
    return [Sample(trajectory, (advantage,)) for trajectory, advantage in zip(said, advantages, strict=True)]


def tensors(sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt's token ids, and the completion's."""
    sequence = sample.trajectory.sequence
    ((start, _),) = sequence.said
    return torch.tensor(sequence.token_ids[:start]), torch.tensor(sequence.token_ids[start:])


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def turnwise_step(samples: Sequence[Sample], folders: Sequence[Path], micro_batch: int) -> Row:
    settings = LearnerSettings(learning_rate=LEARNING_RATE, micro_batch_size=micro_batch)
    learners = [Learner(load(folder), settings, updates=1) for folder in folders]

    def step() -> None:
        for learner in learners:
            learner.update(samples)

    return Row([learner.model for learner in learners], step)


class PreparedGRPOTrainer(GRPOTrainer):
    """Has completions already, where TRL would generate them."""

    prepared: dict[str, torch.Tensor]

    def _generate_and_score_completions(self, inputs: list[dict[str, object]]) -> dict[str, torch.Tensor]:
        return self.prepared


def trl_step(samples: Sequence[Sample], folder: Path, micro_batch: int) -> Row:
    micro_batches = len(samples) // micro_batch
    with TemporaryDirectory() as output:
        settings = GRPOConfig(
            output, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=micro_batches,
            num_generations=GROUP, loss_type="grpo", learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
            gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
        )  # fmt: skip
        trainer = PreparedGRPOTrainer(
            load(folder),
            reward_funcs=lambda **_: [],
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": ""}] * PROBLEMS),
            processing_class=load_tokenizer(folder),
        )
    prompts, completions = zip(*map(tensors, samples), strict=True)
    trainer.prepared = {
        "prompt_ids": pad(prompts, padding_side="left"),
        "prompt_mask": pad([torch.ones_like(ids) for ids in prompts], padding_side="left"),
        "completion_ids": pad(completions),
        "completion_mask": pad([torch.ones_like(ids) for ids in completions]),
        "advantages": torch.tensor([sample.advantages[0] for sample in samples]),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trainer.current_gradient_accumulation_steps = micro_batches
    model = trainer.model

    def step() -> None:
        for _ in range(micro_batches):
            trainer.training_step(model, [], None)
        trainer._clip_grad_norm(model)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()

    return Row([model], step)


def comlrl_step(samples: Sequence[Sample], folders: Sequence[Path]) -> Row:
    settings = MAGRPOConfig(
        num_agents=len(folders), num_turns=1, num_generations=GROUP, rollout_buffer_size=PROBLEMS,
        train_batch_size=PROBLEMS, agent_learning_rate=LEARNING_RATE, agent_devices="cpu",
    )  # fmt: skip
    trainer = MAGRPOTrainer(
        agents=[load(folder) for folder in folders],
        num_agents=len(folders),
        tokenizer=[load_tokenizer(folder) for folder in folders],
        reward_func=lambda *_: [],
        args=settings,
    )
    groups = []
    for start in range(0, len(samples), GROUP):
        group = samples[start : start + GROUP]
        prompts, completions = zip(*map(tensors, group), strict=True)
        # It normalises the returns of a group itself, which all but leaves advantages as they are.
        returns = [sample.advantages[0] for sample in group]
        groups.append(({"prompt_input_ids": prompts[0][None], "completion_input_ids": [list(completions)]}, returns))

    def step() -> None:
        for agent, buffer in enumerate(trainer.rollout_buffers):
            buffer += [NodeSample(agent, 0, completions, returns, 0.0, 0.0, 0) for completions, returns in groups]
        trainer._drain_ready_buffers(list(range(len(folders))))

    return Row(trainer.agents, step)


def warm_up(name: str, row: Row) -> None:
    weights = [parameter for model in row.models for parameter in model.parameters()]
    before = [weight.detach().clone() for weight in weights]
    row.step()
    if any(torch.equal(old, new) for old, new in zip(before, weights, strict=True)):
        raise RuntimeError(f"{name} left weights as they were")


def microseconds(row: Row, tokens: int) -> tuple[float, float]:
    """CPU and wall time a trained token."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    row.step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    trained = len(row.models) * tokens
    return cpu / trained * 1e6, wall / trained * 1e6


def spread(figures: Sequence[float]) -> str:
    return f"{statistics.median(figures):.0f} ({min(figures):.0f}-{max(figures):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences at a time, where that can be set")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    samples = sampled()
    tokens = sum(sample.trajectory.sequence.trained for sample in samples)
    trl, comlrl = (f"{name} {importlib.metadata.version(name)}" for name in ("trl", "comlrl"))
    rows = {
        "turnwise, one policy": turnwise_step(samples, [LONG], arguments.micro_batch),
        "turnwise, two policies": turnwise_step(samples, [LONG, SHORT], arguments.micro_batch),
        f"{trl}, one policy": trl_step(samples, LONG, arguments.micro_batch),
        f"{comlrl}, two policies": comlrl_step(samples, [LONG, SHORT]),
    }
    for name, row in rows.items():
        warm_up(name, row)
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in track(range(arguments.repetitions), transient=True):
        for name, row in rows.items():
            figures[name].append(microseconds(row, tokens))
    first = statistics.median(cpu for cpu, _ in next(iter(figures.values())))
    table = Table(title=f"µs a trained token, {tokens} tokens a policy, median (min-max)")
    table.add_column("")
    for column in ("CPU", "wall", "ratio of CPU"):
        table.add_column(column, justify="right")
    for name, taken in figures.items():
        spreads = [spread(cpu_or_wall) for cpu_or_wall in zip(*taken, strict=True)]
        table.add_row(name, *spreads, f"{statistics.median(cpu for cpu, _ in taken) / first:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
