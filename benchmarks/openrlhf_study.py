"""Training on OpenRLHF, Ray, DeepSpeed and vLLM, on a CPU with the tiny models: what it learns, and what it costs.

    .venv-openrlhf/bin/python benchmarks/openrlhf_study.py              # all of it: some forty minutes on two cores
    .venv-openrlhf/bin/python benchmarks/openrlhf_study.py --only cost

Prints three tables, and writes them to docs/results/openrlhf.json:

- learns: two policies at once, by Long⊗Short, 20 steps, three seeds. The reward of the first and of the last three
  steps; how far the log-probabilities of engine and trainer are apart; and whether, after each broadcast, the engine's
  greedy replies are those of the trainer's weights.
- thinkless: one self-routing policy, by DeGRPO and by GRPO, here and on the embedded trainer.
- cost: a step of two policies over one of one policy that fills both seats, with the same weights and so the same
  dialogues: wall time by stage, and the sequences that each policy's ranks compute.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median, stdev
from tempfile import TemporaryDirectory
from typing import Annotated

import orjson
import torch
from rich.console import Console
from rich.table import Table
from typer import Option

from turnwise.agents.contract import question
from turnwise.agents.engine import EngineAgent
from turnwise.agents.tiny import NOVICE
from turnwise.agents.transformers_engine import TransformersEngine
from turnwise.command import run
from turnwise.environments.transcript import Reply
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.loss import LossSettings
from turnwise.rl.metrics import read_metrics
from turnwise.rl.openrlhf.policy import OpenRLHFPolicy
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.recipe import LongShortRecipe, Recipe, ThinklessRecipe
from turnwise.rl.trained_policy import Policy
from turnwise.rl.trainer import Trainer, TrainingSettings
from turnwise.train import open_trainer

RESULTS = Path("docs/results/openrlhf.json")
ON_CPU = OpenRLHFSettings(gpus_per_rank=0, precision="fp32", gpus_per_actor=0, cache_gigabytes=0.2)
SEEDS, STEPS, ENDS = 3, 20, 3
ROUTED = 12
REPEATS = 5


def main(
    only: Annotated[list[str] | None, Option(help="learns, thinkless or cost; by default all.")] = None,
    seeds: int = SEEDS,
) -> None:
    """Trains on OpenRLHF, and tells how it went."""
    console = Console(width=110)
    found = orjson.loads(RESULTS.read_bytes()) if RESULTS.exists() else {}
    parts = {
        "learns": lambda: learns(console, seeds),
        "thinkless": lambda: thinkless(console),
        "cost": lambda: cost(console),
    }
    for part in only or parts:
        found[part] = parts[part]()
        RESULTS.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))


# Two policies learn


def learns(console: Console, seeds: int) -> list[dict[str, float]]:
    """Long⊗Short, once for each seed."""
    rows = []
    for seed in range(seeds):
        training = TrainingSettings(
            rounds="long+short", steps=STEPS, problems=8, samples=8, seed=seed, evaluate_every=STEPS, keep_episodes=0
        )
        recipe = LongShortRecipe(
            brevity=((0, 0.5),),
            long_tokens=150,
            short_tokens=150,
            training=training,
            test_problems=48,
            backend="openrlhf",
            openrlhf=ON_CPU,
        )
        with trained(recipe) as trainer:
            alike = sum(
                all(greedy_is_the_trainers(trainer, name) for name in trainer.policies) for _ in trainer.train()
            )
            logged = read_metrics(trainer.folder)
        first, last = logged[1 : 1 + ENDS], logged[-ENDS:]
        row = {"seed": float(seed), "broadcasts": float(len(logged)), "greedy alike": float(alike)}
        for name in ("long", "short"):
            row[f"reward/{name}, first"] = fmean(step[f"reward/{name}"] for step in first)
            row[f"reward/{name}, last"] = fmean(step[f"reward/{name}"] for step in last)
            row[f"mismatch/{name}"] = max(step[f"{name}/engine_mismatch"] for step in logged[1:])
        for name in ("right", "tokens"):
            row[f"{name}, before"], row[f"{name}, after"] = (logged[at][f"evaluation/{name}"] for at in (0, -1))
        rows.append(row)
    table = Table(title=f"Two policies on OpenRLHF: {STEPS} steps, {seeds} seeds", title_justify="left")
    for heading in ("", f"first {ENDS} steps", f"last {ENDS} steps", "change, 95% interval"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in ("long", "short"):
        first, last = ([row[f"reward/{name}, {end}"] for row in rows] for end in ("first", "last"))
        changes = [after - before for before, after in zip(first, last, strict=True)]
        table.add_row(f"reward of {name}", f"{fmean(first):+.3f}", f"{fmean(last):+.3f}", interval(changes))
    for name, form in (("right", "{:.1%}"), ("tokens", "{:.1f}")):
        before, after = (fmean(row[f"{name}, {when}"] for row in rows) for when in ("before", "after"))
        table.add_row(f"evaluation: {name}", form.format(before), form.format(after), "")
    console.print(table)
    for name in ("long", "short"):
        apart = max(row[f"mismatch/{name}"] for row in rows)
        console.print(f"log-probabilities of {name}'s engine and trainer: at most {apart:.1e} apart, mean of a step")
    alike, broadcasts = (int(sum(row[key] for row in rows)) for key in ("greedy alike", "broadcasts"))
    console.print(f"greedy replies of both engines those of the trainer's weights: after {alike} of {broadcasts} steps")
    return rows


def greedy_is_the_trainers(trainer: Trainer, name: str) -> bool:
    """Whether the engine, once it has the weights, says what a plain transformers model with them says."""
    policy = of(trainer, name)
    reference = TransformersEngine.load(trainer.policies[name].model, dtype=torch.float32)
    reference.model.load_state_dict(policy._learner.weights())

    async def say(engine: EngineAgent) -> list[tuple[int, ...]]:
        asked: list[Reply] = await asyncio.gather(
            *(engine.reply(question(number, max_tokens=40), 0) for number in range(4))
        )
        return [reply.token_ids for reply in asked]

    async def compare() -> bool:
        await policy.publish()
        return await say(EngineAgent(policy.engine, temperature=0)) == await say(EngineAgent(reference, temperature=0))

    return asyncio.run(compare())


def interval(values: Sequence[float]) -> str:
    """Of the mean, by Student's t."""
    if len(values) < 2:
        return f"{values[0]:+.3f}"
    half = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)] * stdev(values) / len(values) ** 0.5
    return f"{fmean(values):+.3f} ± {half:.3f}"


# One policy routes itself


def thinkless(console: Console) -> list[dict[str, float | str]]:
    """DeGRPO and GRPO, on both trainers."""
    rows: list[dict[str, float | str]] = []
    for backend in ("embedded", "openrlhf"):
        for aggregation in ("degrpo", "sample-mean"):
            loss = LossSettings.model_validate({"aggregation": aggregation, "alpha": 0.1})
            recipe = ThinklessRecipe.model_validate({
                "backend": backend, "openrlhf": ON_CPU, "test_problems": 120,
                "learner": LearnerSettings(learning_rate=2e-4, schedule="constant", loss=loss),
                "training": TrainingSettings(
                    steps=ROUTED, problems=16, estimator="grpo", evaluate_every=ROUTED, keep_episodes=0
                ),
            })  # fmt: skip
            with trained(recipe) as trainer:
                list(trainer.train())
                logged = read_metrics(trainer.folder)
            weights = {
                mode: fmean(
                    step[f"solver/control/weight/{mode}"]
                    for step in logged[1:]
                    if f"solver/control/weight/{mode}" in step
                )
                for mode in ("<short>", "<think>")
            }
            rows.append({
                "backend": backend, "loss": aggregation, "short over think": weights["<short>"] / weights["<think>"],
                **{f"{name}, before": logged[0][f"evaluation/{name}"] for name in ("right", "tokens")},
                **{f"{name}, after": logged[-1][f"evaluation/{name}"] for name in ("right", "tokens")},
                "thinks, before": logged[0]["evaluation/share of modes/<think>"],
                "thinks, after": logged[-1].get("evaluation/share of modes/<think>", 0.0),
            })  # fmt: skip
    table = Table(title=f"Thinkless, {ROUTED} steps, one seed", title_justify="left")
    for heading in ("", "right", "tokens", "thinks", "gradient weight, short over think"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(
            f"{row['backend']}, {'DeGRPO' if row['loss'] == 'degrpo' else 'GRPO'}",
            f"{row['right, before']:.1%} → {row['right, after']:.1%}",
            f"{row['tokens, before']:.1f} → {row['tokens, after']:.1f}",
            f"{row['thinks, before']:.0%} → {row['thinks, after']:.0%}",
            f"{row['short over think']:.2f}",
        )
    console.print(table)
    return rows


# What a second policy costs


class Shared(LongShortRecipe):
    """The same weights in both seats, as one policy or as two."""

    apart: bool

    def policies(self) -> dict[str, Policy]:
        """One, or one for each seat."""
        seats = [("long",), ("short",)] if self.apart else [("long", "short")]
        return {"-".join(of_one): Policy(NOVICE, of_one, self.learner) for of_one in seats}


def cost(console: Console) -> dict[str, Mapping[str, float]]:
    """One policy, then two: the stages of their steps, and who computes what."""
    found = {}
    for apart in (False, True):
        training = TrainingSettings(
            steps=REPEATS + 2, problems=8, samples=8, evaluate_every=99, checkpoint_every=99, keep_episodes=0
        )
        recipe = Shared(
            apart=apart, long_tokens=120, short_tokens=60, training=training, test_problems=1, backend="openrlhf",
            openrlhf=ON_CPU, learner=LearnerSettings(learning_rate=1e-9),
        )  # fmt: skip
        with trained(recipe) as trainer:
            found["two policies" if apart else "one policy"] = stages(trainer)
    one, two = found["one policy"], found["two policies"]
    table = Table(title="A step, seconds of wall time (median), same dialogues", title_justify="left")
    for heading in ("", "one policy", "two policies", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in one:
        table.add_row(name, f"{one[name]:.2f}", f"{two[name]:.2f}", f"{two[name] / one[name]:.2f}")
    console.print(table)
    return found


def stages(trainer: Trainer) -> dict[str, float]:
    """Of each step but the first, which warms up."""
    took = defaultdict[str, list[float]](list)
    reports = trainer.train()
    next(reports)
    for name in ("_episodes", "_learn", "_publish"):
        setattr(trainer, name, timed(getattr(trainer, name), took[name]))
    for name in trainer.policies:
        of(trainer, name)._learner._all(of(trainer, name)._learner._policy, "__ray_call__", _count_rows)
    for _ in range(REPEATS + 1):
        began = time.monotonic()
        report = next(reports)
        took["step"].append(time.monotonic() - began)
        learnt = [report.figures[f"{name}/trained_tokens"] for name in trainer.policies]
        took["trained tokens"].append(sum(learnt))
    rows = [
        of(trainer, name)._learner._all(of(trainer, name)._learner._policy, "__ray_call__", _rows)
        for name in trainer.policies
    ]
    sampling, publishing = took.pop("_episodes"), took.pop("_publish")
    found = {
        "rollout, with the broadcast before it": median(sampling[1:]), "broadcast": median(publishing[1:]),
        "update": median(took["_learn"][1:]), "step": median(took["step"][1:]),
        "trained tokens": median(took["trained tokens"][1:]),
        "sequences computed": sum(sum(of_one) for of_one in rows) / (REPEATS + 1),
    }  # fmt: skip
    reports.close()  # type: ignore[attr-defined]
    return found


def timed(method, took: list[float]):  # type: ignore[no-untyped-def]
    async def call(*arguments: object, **named: object) -> object:
        began = time.monotonic()
        try:
            return await method(*arguments, **named)
        finally:
            took.append(time.monotonic() - began)

    return call


def _count_rows(rank) -> None:  # type: ignore[no-untyped-def]
    rank.rows = 0

    def count(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        rank.rows += len(inputs[0])

    rank.actor.register_forward_pre_hook(count)


def _rows(rank) -> int:  # type: ignore[no-untyped-def]
    return int(rank.rows)


def of(trainer: Trainer, name: str) -> OpenRLHFPolicy:
    policy = trainer.trained[name]
    assert isinstance(policy, OpenRLHFPolicy)
    return policy


@contextmanager
def trained(recipe: Recipe) -> Iterator[Trainer]:
    with (
        TemporaryDirectory() as folder,
        open_trainer(recipe.model_copy(update={"output": Path(folder) / "run"})) as trainer,
    ):
        yield trainer


if __name__ == "__main__":
    run(main)
