"""Stage 1 of Thinkless: a model learns, from pairs of a long and a short answer, to open with `<think>` or `<short>`.

    python examples/warm_up_thinkless.py                # answers of the tiny models on arithmetic; some four minutes
    python examples/warm_up_thinkless.py --pairs pairs.jsonl --student deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \\
        --sft.learning-rate 1e-5 --sft.batch-size 128 --sft.micro-batch-size 1 --longest 16384 --device cuda \\
        --test math-500 --max-tokens 24576

With `--backend openrlhf` the student learns on OpenRLHF, as `--openrlhf.ranks 4` and the like say.

A file of pairs has the columns "problem", "answer", "think" (reasoning, `</think>`, solution) and "short". Each pair
gives two independent samples; both modes end about equally likely, whatever the problem. The control tokens must be
single tokens of the student's vocabulary, and its chat template must not force one; where it is otherwise, it is said.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt
from rich.console import Console

from turnwise import show
from turnwise.agents.tiny import LONG, NOVICE, ROUTER
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.analysis.tables import left_out
from turnwise.command import run_configured
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.problem import Problem
from turnwise.protocols.solo import Solo
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.sft import SFTSettings
from turnwise.rl.sft_sets import paired_rows, write_set


class Config(BaseModel):
    """A model learns from pairs of a long and a short answer to open with `<think>` or `<short>`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: Path | None = None
    problems: PositiveInt = 600
    long_teacher: str = str(LONG)
    short_teacher: str = str(ROUTER)
    student: str = str(NOVICE)
    longest: PositiveInt | None = None
    sft: SFTSettings = SFTSettings(steps=150, learning_rate=2e-3, weight_decay=0.01)
    backend: Literal["embedded", "openrlhf"] = "embedded"
    openrlhf: OpenRLHFSettings = OpenRLHFSettings()
    test: str = "mixed"
    test_problems: PositiveInt = 200
    max_tokens: PositiveInt = 1024
    device: str = "cpu"
    seed: int = 0
    output: Path = Path("runs/warm_up_thinkless")


def answered(config: Config, mode: str, grader: MathGrader, console: Console) -> list[Problem]:
    """The problems with the answers of one mode as their solutions: from the file, or by a teacher.

    A teacher's answer is empty where it was cut off, or thought and wrong. Short ones may be wrong, or hard problems
    would have no pair.
    """
    if config.pairs:
        return list(show.read_problems(config.pairs, number=config.problems, solution=mode))
    problems = arithmetic(grader, count=config.problems, split="train", seed=config.seed)
    think = mode == "think"
    protocol = Solo(max_tokens=config.max_tokens, answer_after="</think>") if think else Thinkless(mode="short")
    model = config.long_teacher if think else config.short_teacher
    team = {"solver": TransformersAgent(TransformersEngine.load(model, device=config.device), temperature=0.6)}
    said = show.play_shown(mode, protocol, team, problems, console, output=config.output, settings={"teacher": model})
    fine = [e.transcript.steps[-1].reply.finish != "length" and (e.right or not think) for e in said]
    return [
        replace(e.transcript.problem, solution=e.transcript.text if usable else "")
        for e, usable in zip(said, fine, strict=True)
    ]


def main(config: Config) -> None:
    """Writes the pairs, trains on them, and plays the result in the mode of its choice and in each."""
    console, data = Console(), config.output / "pairs.parquet"
    with MathGrader() as grader:
        think, short = (answered(config, mode, grader, console) for mode in ("think", "short"))
        template = TransformersEngine.load(config.student).template
        pairs = [(one, one.solution, other.solution) for one, other in zip(think, short, strict=True)]
        rows, dropped = paired_rows(pairs, template, seed=config.seed)
        if dropped:
            console.print(left_out(dropped, kept=len(rows) // 2, title="Pairs left out"))
        write_set(data, rows)
        model = show.fine_tune_shown(
            config.student, data, config.sft, config.output / "router", console,
            seed=config.seed, together=2, longest=config.longest, device=config.device,
            openrlhf=config.openrlhf if config.backend == "openrlhf" else None,
        )  # fmt: skip
        team = {"solver": TransformersAgent(TransformersEngine.load(model, device=config.device))}
        test = show.open_environment(config.test, grader, number=config.test_problems, seed=0)
        budget = {"short_tokens": config.max_tokens, "think_tokens": config.max_tokens}
        protocols = {"its own choice": Thinkless(**budget), "always think": Thinkless(mode="think", **budget)}
        protocols["never think"] = Thinkless(mode="short", **budget)
        runs = {
            title: show.play_shown(title, protocol, team, test, console, output=config.output)
            for title, protocol in protocols.items()
        }
    show.show_results(runs, test, console, baseline="always think", results=config.output / "results.json")


if __name__ == "__main__":
    run_configured(main, Config)
